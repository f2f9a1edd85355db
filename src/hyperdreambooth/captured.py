"""CUDA graphs: what a GPU is asked to do again and again is recorded once and then replayed as one call.

A step of a training is thousands of kernels, and starting them one by one takes a host several times as long
as a GPU needs to run them. This module is the only one that knows CUDA's streams and graphs. On every other
device a `Captured` function is simply called.

What is replayed is what was launched. So a captured function takes everything that changes as tensors, reads
no number back to the host, and makes no Python decision that another call would make otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as tree

WARM_UP = 2
"""Calls of a shape before it is captured: libraries choose their kernels, and Adam makes its moments."""

SHAPES = 4
"""Graphs of one function; calls of further shapes are not captured, as each graph keeps memory."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; the host does not wait until it has arrived there."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Graph(Protocol):
    """What records a function and replays it."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Calls the function as it will be recorded, and returns what it returned."""
        ...

    def record(self, call: Callable[[], Any]) -> Any:
        """Records the function without computing anything; returns the tensors that `replay` fills."""
        ...

    def replay(self) -> None:
        """Computes what was recorded."""
        ...


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the one stream of all recordings: autograd ties a leaf to the stream of its first backward."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """Records what a function launches on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._graph = _stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Calls the function on the stream of the recording."""
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            made = call()
        here.wait_stream(self._stream)
        return made

    def record(self, call: Callable[[], Any]) -> Any:
        """Records the function."""
        torch.cuda.synchronize(self._stream.device)
        # other threads, such as those that load photos, may use the device meanwhile
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return call()

    def replay(self) -> None:
        """Replays the recording on the current stream."""
        self._graph.replay()


GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": CudaGraph}
"""Kind of device → its graphs."""


class _Shape:
    """One shape of arguments: the memory that a graph reads them from, and the graph."""

    def __init__(self, graph: Graph, tensors: list[Tensor]) -> None:
        self.graph, self.calls, self.recorded, self.result = graph, 0, False, None
        self.tensors = [tensor.clone() for tensor in tensors]

    def fill(self, tensors: list[Tensor]) -> None:
        """Copies the arguments of a call to where the graph reads them."""
        for mine, given in zip(self.tensors, tensors, strict=True):
            mine.copy_(given, non_blocking=True)


class Captured:
    """A function of tensors that is captured at its third call with one shape of arguments, then replayed.

    Where it cannot be captured, it is called as it is, with one warning.

    Args:
        function: takes tensors, also in lists and dicts, and constants. What else it reads must stay where
            it is in memory.
        device: where it computes.
        enabled: whether to capture at all.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, enabled: bool = True) -> None:
        self._function, self._device = function, device
        self._graph = GRAPHS.get(device.type) if enabled else None
        self._shapes: dict[Any, _Shape] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Returns the function's result; its tensors belong to the caller."""
        if self._graph is None:
            return self._function(*arguments, **named)
        flat, form = tree.tree_flatten((arguments, named))
        tensors = [one for one in flat if isinstance(one, Tensor)]
        shape = self._shape(flat, form, tensors)
        if shape is None:
            return self._function(*arguments, **named)
        shape.fill(tensors)
        places = iter(shape.tensors)
        own = [next(places) if isinstance(one, Tensor) else one for one in flat]
        arguments, named = tree.tree_unflatten(own, form)
        return self._run(shape, lambda: self._function(*arguments, **named))

    def forget(self) -> None:
        """Gives the memory of all graphs back; what is called next is captured anew."""
        self._shapes.clear()

    def _shape(self, flat: list[Any], form: Any, tensors: list[Tensor]) -> _Shape | None:
        """Returns the graph of arguments of this shape; None for one shape too many."""
        key = (
            str(form),
            tuple(
                (one.shape, one.dtype, one.device) if isinstance(one, Tensor) else repr(one) for one in flat
            ),
        )
        if key not in self._shapes and len(self._shapes) < SHAPES and self._graph is not None:
            self._shapes[key] = _Shape(self._graph(self._device), tensors)
        return self._shapes.get(key)

    def _run(self, shape: _Shape, call: Callable[[], Any]) -> Any:
        """Warms up, records or replays."""
        if shape.calls < WARM_UP:
            shape.calls += 1
            return shape.graph.warm_up(call)
        if not shape.recorded:
            try:
                shape.result = shape.graph.record(call)
            except Exception as error:
                return self._give_up(error, call)
            shape.recorded = True
        shape.graph.replay()
        return tree.tree_map_only(Tensor, Tensor.clone, shape.result)

    def _give_up(self, error: Exception, call: Callable[[], Any]) -> Any:
        """Goes on without graphs; nothing was computed while it was recorded."""
        reason = str(error).partition("\n")[0][:200]
        warnings.warn(f"not captured as a CUDA graph, which takes longer: {reason}", stacklevel=4)
        self._graph = None
        made = call()
        self._shapes.clear()
        return made
