"""A warm process: the step of the last training stays as it is, and the next person's numbers go into it.

A step that a GPU has recorded reads fixed places in memory. The next training of the same shape copies its
leaves there and replays it from its first step on. A training of another shape makes a new step, and the
memory of the old one is given back first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hyperdreambooth.base.load import Base
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.step import Step
from hyperdreambooth.training.trainable import FactorLeaves, Trainable


class Warm:
    """Keeps one step between trainings."""

    def __init__(self) -> None:
        self._key: Any = None
        self._step: Step | None = None

    def step(self, base: Base, trainable: Trainable, people: int, config: TrainConfig) -> Step:
        """Returns a step that starts from these leaves: the kept one if it has the same shape."""
        key = _shape(base, trainable, config)
        if self._step is not None and key is not None and key == self._key:
            self._step.begin(trainable)
            _copy_fixed(trainable, self._step.trainable)
            return self._step
        self.forget()
        self._key, self._step = key, Step(base, trainable, people, config)
        return self._step

    @torch.no_grad()
    def hand_over(self, trainable: Trainable) -> None:
        """Copies what was trained to the leaves that the training was asked to train."""
        if self._step is not None and self._step.trainable is not trainable:
            for name, leaf in trainable.leaves.items():
                leaf.copy_(self._step.trainable.leaves[name])

    def forget(self) -> None:
        """Gives the memory back."""
        if self._step is not None:
            self._key = self._step = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@torch.no_grad()
def _copy_fixed(given: Any, kept: Any) -> None:
    """Copies what is not trained, such as the prediction beside which a LoRA is."""
    for mine, other in zip(kept.fixed, given.fixed, strict=True):
        mine.copy_(other)


def _shape(base: Base, trainable: Trainable, config: TrainConfig) -> Any:
    """Returns everything that shapes a step besides its inputs; None for leaves that cannot be replaced."""
    if not isinstance(trainable, FactorLeaves) or trainable.fixed is None:
        return None
    with torch.no_grad():
        worn = trainable.to_factors(trainable.leaves, torch.float32)
    sites = [(name, down.shape, up.shape) for name, (down, up) in worn.items()]
    networks = [_places(module) for module in base.components.values()]
    return config.model_copy(update={"seed": 0}), sites, networks


def _places(module: nn.Module) -> list[Any]:
    """Returns what a network is made of, and where its weights lie in memory."""
    weights = [(one.data_ptr(), one.dtype, one.stride()) for one in module.parameters()]
    parts = [(type(one), type(getattr(one, "processor", None))) for one in module.modules()]
    return [weights, parts]
