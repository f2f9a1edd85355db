"""The identity score: 0 is a stranger, 1 is the person (docs/concepts.md, "Scores")."""

from __future__ import annotations

from pydantic import BaseModel
from torch import Tensor


class Calibration(BaseModel):
    """Mean cosine of two real photos of one person, and of two people, in a scorer's embedding."""

    same: float
    stranger: float


# (cos(generated, other photos) - cos(strangers)) / (cos(same) - cos(strangers))
def identity_scores(generated: Tensor, others: Tensor, calibration: Calibration) -> Tensor:
    """How much each picture shows the person, averaged over the person's photos.

    Args:
        generated: unit embeddings `(m, e)` of generated pictures.
        others: unit embeddings `(k, e)` of real photos of the person. Never the reference photo: copying its
            pose and light would be rewarded.
        calibration: where 0 and 1 lie.

    Returns:
        `(m,)`; not clipped, so that averages stay honest.
    """
    cosine = (generated @ others.T).mean(dim=1)
    return (cosine - calibration.stranger) / (calibration.same - calibration.stranger)
