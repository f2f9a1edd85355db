"""The losses of one step, for tests that compare them."""

from __future__ import annotations

from torch import Tensor

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.load import Base
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.step import step_inputs, step_losses


def losses_of(base: Base, samples: Samples, encode: Conditioner, config: TrainConfig, step: int) -> Tensor:
    """Each person's loss in a step, `(n,)`."""
    return step_losses(base, encode, config, step_inputs(base, samples, encode, config, step))
