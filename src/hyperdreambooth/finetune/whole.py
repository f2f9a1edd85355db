"""DreamBooth as it was published: the base's own weights are trained, all of them (Ruiz et al., 2023)."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError, whole_folder
from hyperdreambooth.finetune.trainable import Put


def _parameters(base: Base, parts: Collection[str]) -> dict[str, nn.Parameter]:
    """Name → parameter of some components."""
    return {
        f"{part}.{name}": parameter
        for part, module in base.components.items()
        if part in parts
        for name, parameter in module.named_parameters()
    }


@contextmanager
def _lent(parameters: Mapping[str, nn.Parameter]) -> Generator[None]:
    """Parameters that may be changed in the block; afterwards they are as before, bit for bit, and frozen."""
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.requires_grad_(False).copy_(before[name])
                parameter.grad = None


class Whole:
    """One person as weights of the base: what full DreamBooth trains, and what it leaves behind.

    Attributes:
        weights: parameter's name → its trained numbers, on the CPU.
        metadata: what the training noted.
        people: always 1: two people cannot share one set of weights.
        parts: the components that are trained.
    """

    people = 1

    def __init__(self, base: Base, text_encoder: bool = True) -> None:
        if base.dtype != torch.float32:
            raise InputError(
                f"dtype: full DreamBooth trains the base's own weights and needs float32, got {base.dtype}"
            )
        self.metadata = dict[str, str]()
        self.parts = set(base.components) if text_encoder else {base.family.DENOISER}
        self.leaves: dict[str, Tensor] = {**_parameters(base, self.parts)}
        self.weights: dict[str, Tensor] = {}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """The base's own weights are trained; what they become is kept, and the base gets its own back."""
        parameters = _parameters(base, self.parts)
        with _lent(parameters):
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield lambda images: None
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}

    @contextmanager
    def worn(self, base: Base) -> Generator[None]:
        """The base has the person's weights in the block."""
        parameters = _parameters(base, self.parts)
        with _lent(parameters), torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
            yield

    @property
    def nbytes(self) -> int:
        """Bytes a person, as float32."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def save(self, folder: Path, base: Base) -> None:
        """Writes a whole pipeline, that any tool loads and that is a base of its own."""
        about = {"trigger": base.trigger, "class_word": base.class_word}
        with self.worn(base), whole_folder(folder) as part:
            base.pipe.save_pretrained(part)
            (part / "hyperdreambooth.json").write_text(json.dumps(about), encoding="utf-8")
