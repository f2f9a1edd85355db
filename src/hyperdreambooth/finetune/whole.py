"""DreamBooth as it was published: all of the base's own weights are trained (Ruiz et al., 2023)."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError, whole_folder
from hyperdreambooth.training.trainable import Put


def _parameters(base: Base, parts: Collection[str]) -> dict[str, nn.Parameter]:
    """Returns the parameters of some components by name."""
    return {
        f"{part}.{name}": parameter
        for part, module in base.components.items()
        if part in parts
        for name, parameter in module.named_parameters()
    }


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Generator[None]:
    """Restores parameters bit for bit, and freezes them, after a block that may change them."""
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.requires_grad_(False).copy_(before[name])
                parameter.grad = None


class Whole:
    """One person as weights of the base: what full DreamBooth trains, and its result.

    Attributes:
        weights: the trained parameters by name, on the CPU.
        metadata: the `Outcome.metadata` of the training.
        parts: the components that are trained.
    """

    def __init__(self, base: Base, text_encoder: bool = True) -> None:
        if base.quantize:
            raise InputError(
                f"quantize: full DreamBooth trains the base's own weights, which {base.quantize} freezes; "
                "load the base without it"
            )
        if base.dtype != torch.float32:
            raise InputError(
                f"dtype: full DreamBooth trains the base's own weights and needs float32, got {base.dtype}; "
                "load the base in float32"
            )
        self.metadata = dict[str, str]()
        self.parts = set(base.components) if text_encoder else {base.family.DENOISER}
        self.leaves: dict[str, Tensor] = {**_parameters(base, self.parts)}
        self.weights: dict[str, Tensor] = {}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """Lets the base's own weights be trained in the block; then keeps them and restores the base."""
        parameters = _parameters(base, self.parts)
        with _restored(parameters):
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield lambda images: None
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}

    @contextmanager
    def worn(self, base: Base) -> Generator[None]:
        """Gives the base the person's weights for the length of the block."""
        parameters = _parameters(base, self.parts)
        with _restored(parameters), torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
            yield

    def save(self, folder: Path, base: Base) -> None:
        """Writes a whole pipeline, which any tool loads and which is a base of its own."""
        words = {"trigger": base.trigger, "class_word": base.class_word}
        base.wake()
        with self.worn(base), whole_folder(folder) as part:
            base.pipe.save_pretrained(part)
            (part / "hyperdreambooth.json").write_text(json.dumps(words), encoding="utf-8")
