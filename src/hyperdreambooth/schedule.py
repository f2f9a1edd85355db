"""The learning-rate schedule that every training here uses."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Shape: TypeAlias = Literal["constant", "cosine"]


def learning_rate(peak: float, step: int, steps: int, *, warmup: int = 0, shape: Shape = "cosine") -> float:
    """Returns the learning rate of a step: a linear warm-up, then a constant or half a cosine down to 0.

    Args:
        peak: the rate at the end of the warm-up.
        step: the step that is about to be taken; the first one is 0, and its rate is above 0.
        steps: the steps of the whole training, the warm-up included.
        warmup: the steps of the linear rise.
        shape: what follows the warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
