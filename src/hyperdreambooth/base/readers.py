"""Frozen text encoders, often larger than the denoiser: read when texts are encoded, let go for a training.

CLIP text encoders may wear an adapter and are never let go. A pipeline that was made in memory, or read from
a single file, keeps its readers: there are no files to read them from again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hyperdreambooth.base.fingerprint import files_fingerprint


@dataclass
class Readers:
    """The text encoders of a pipeline that no adapter of ours changes.

    Attributes:
        names: the components, at most one in the families that are known.
        load: reads them from their files, name → network.
        folder, variant: of the pipeline's files.
        device: where they are put when they come back.
        training: whether a training is on. Pictures that are drawn during it let them go again.
    """

    names: tuple[str, ...]
    load: Callable[[], Mapping[str, nn.Module]]
    folder: Path
    variant: str | None
    device: torch.device | str = "cpu"
    training: bool = False

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name their weights; the networks are not needed for it."""
        return files_fingerprint([self.folder / name for name in self.names], self.variant)


_of: WeakKeyDictionary[Any, Readers] = WeakKeyDictionary()


def read_lazily(pipe: Any, readers: Readers) -> None:
    """Notes that a pipeline's readers can be read from files."""
    _of[pipe] = readers


def readers_of(pipe: Any) -> Readers | None:
    """Returns the readers of a pipeline; None if they always stay in memory."""
    return _of.get(pipe)


def has_reader(pipe: Any, name: str) -> bool:
    """Returns whether a pipeline has a text encoder, in memory or in its files."""
    readers = _of.get(pipe)
    return getattr(pipe, name) is not None or (readers is not None and name in readers.names)


def reader(pipe: Any, name: str) -> Any:
    """Returns a text encoder of a pipeline that has it."""
    if getattr(pipe, name) is None:
        fetch(pipe)
    return getattr(pipe, name)


def awake(pipe: Any) -> bool:
    """Returns whether all text encoders are in memory."""
    readers = _of.get(pipe)
    return readers is None or all(getattr(pipe, name) is not None for name in readers.names)


def fetch(pipe: Any) -> None:
    """Brings all text encoders into memory."""
    if awake(pipe):
        return
    readers = _of[pipe]
    for name, network in readers.load().items():
        network.requires_grad_(False).eval()
        # this also writes the component down again, which setting it to None has struck out
        pipe.register_modules(**{name: network.to(readers.device)})


def let_go(pipe: Any) -> None:
    """Frees the memory of the readers, unless one of them wears an adapter of another tool."""
    readers = _of.get(pipe)
    for name in readers.names if readers is not None else ():
        if not hasattr(getattr(pipe, name), "peft_config"):
            setattr(pipe, name, None)


@contextmanager
def reading(pipe: Any, denoiser: nn.Module, offload: bool) -> Generator[None]:
    """Has the readers beside the denoiser, or with `offload` in its place, and then lets them go."""
    readers, place = readers_of(pipe), next(denoiser.parameters()).device
    if readers is None:
        yield
        return
    if offload:
        denoiser.to("cpu")
    try:
        readers.device = place
        fetch(pipe)
        for name in readers.names:  # they may be on the CPU, where drawing with `offload` has left them
            getattr(pipe, name).to(place)
        yield
    finally:
        let_go(pipe)
        denoiser.to(place)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """Returns every network of a pipeline that is in memory, also those that never wear an adapter."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def in_turn(pipe: Any, options: Mapping[str, Any], device: torch.device) -> list[Any]:
    """Draws pictures with one network on the device after the other."""
    places = {module: next(module.parameters()).device for module in networks(pipe).values()}
    try:
        pipe.enable_model_cpu_offload(device=device)
        return pipe(**options).images
    finally:
        pipe.remove_all_hooks()
        for module, place in places.items():
            module.to(place)
