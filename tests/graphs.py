"""A CUDA graph on the CPU: records the operators that a function calls, and calls the same ones again.

Like a real one it knows nothing of Python: what is replayed reads the memory that was read while recording,
and constants are those of the recording. Reading a number back to the host, or making a tensor from Python
numbers on the host, fails as it does while a GPU records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = (
    "_local_scalar_dense",
    "lift_fresh",
    "nonzero",
    "is_nonzero",
    "equal",
    "randn",
    "rand",
    "bernoulli",
)


def name_of(operator: Any) -> str:
    """The name of an operator without its overload."""
    return operator.name().removeprefix("aten::").split(".")[0]


class _Recorder(TorchDispatchMode):
    """Calls every operator and keeps it, with the memory that it wrote to as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name_of(func) in FORBIDDEN:
            raise RuntimeError(f"{func.name()}: not permitted while a graph is recorded")
        kwargs = kwargs or {}
        if name_of(func) in ("index", "index_put", "index_put_") and _chosen_by_truth(args[1]):
            raise RuntimeError(f"{func.name()}: a mask as an index waits for the number of its rows")
        for given, argument in zip([*args, *kwargs.values()], _arguments(func, args, kwargs), strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(given):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The schema's arguments in the order of `args` and `kwargs`."""
    named = {one.name: one for one in func._schema.arguments}
    return [*func._schema.arguments[: len(args)], *(named[name] for name in kwargs)]


def tensors_in(some: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples."""
    return [one for one in tree.tree_leaves(some) if isinstance(one, Tensor)]


def _chosen_by_truth(indices: Any) -> bool:
    """Whether some index is a mask, which a GPU turns into places by `nonzero`."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class RecordedGraph:
    """Has the interface of `captured.Graph`."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.recorder, self.replays = _Recorder(), 0

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, call: Callable[[], Any]) -> Any:
        """Records a call. A real graph computes nothing meanwhile, so what it wrote is put back."""
        try:
            with self.recorder:
                return call()
        finally:
            with torch.no_grad():
                for tensor, before in self.recorder.before.values():
                    tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.recorder.calls:
            again = func(*args, **kwargs)
            if not writes_or_views(func):
                for mine, fresh in zip(tensors_in(made), tensors_in(again), strict=True):
                    mine.detach().copy_(fresh)


def writes_or_views(func: Any) -> bool:
    """Whether an operator's outputs are memory that is there already."""
    return func._schema.is_mutable or any(one.alias_info is not None for one in func._schema.returns)
