"""Who is on a picture: the calibrated identity score, and the scores of MultiID-Bench.

MultiID-Bench (WithAnyone, Xu et al., arXiv 2510.14975, ICLR 2026) compares a generated picture with the
target photo and with the reference photo. Its Copy-Paste score says which of the two it is closer to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from hyperdreambooth.evaluate.face_encoders import Calibration, FaceEncoder

Embed: TypeAlias = Callable[[Sequence[Image.Image]], Tensor]
"""`m` pictures → unit embeddings `(m, e)` on the CPU; a row is NaN where a picture has no face."""

Values: TypeAlias = list[float | None]

_LEAST_ANGLE = 1e-6  # ε of equation 2; the benchmark's own value is not in the paper's text


# (cos(generated, other photos) - cos(strangers)) / (cos(same) - cos(strangers))   (docs/concepts.md)
def identity_scores(generated: Tensor, others: Tensor, calibration: Calibration) -> Tensor:
    """Computes how much each picture looks like the person: 0 like a stranger, 1 like the person.

    Args:
        generated: unit embeddings `(m, e)` of generated pictures.
        others: unit embeddings `(k, e)` of real photos of the person. The reference photo must not be among
            them: it would reward pictures that copy its pose and light.
        calibration: the cosines that score 1 and 0.

    Returns:
        `(m,)`, means over the photos; not clipped, so that means over pictures stay unbiased.
    """
    cosine = (generated @ others.T).mean(dim=1)
    return (cosine - calibration.stranger) / (calibration.same - calibration.stranger)


# M_CP = (θ_gt - θ_gr) / max(θ_tr, ε)   (WithAnyone, equation 2; g generated, t target, r reference)
def copy_paste(generated: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
    """Computes whether pictures are closer to the reference photo (up to 1) or to the target (down to -1).

    Args:
        generated: unit embeddings `(m, e)`.
        targets: unit embeddings `(k, e)` of other photos of the person.
        reference: unit embedding `(e,)`.

    Returns:
        `(m,)`, means over the targets. Differs from the paper: our prompts have no photo of their own, so
        each other photo of the person is a target.
    """
    to_targets = _angles(generated, targets)
    to_reference, across = _angles(generated, reference[None]), _angles(reference[None], targets)
    return ((to_targets - to_reference) / across.clamp_min(_LEAST_ANGLE)).mean(1)


def _angles(some: Tensor, others: Tensor) -> Tensor:
    """Returns the angles `(m, k)` in radians; by the arc's chord, which stays exact for small ones."""
    a, b = normalize(some.double(), dim=1), normalize(others.double(), dim=1)
    return 2 * ((a[:, None] - b[None]).norm(dim=2) / 2).clamp(max=1).asin()


@dataclass(frozen=True)
class Judge:
    """An encoder of identities, with the meaning of its cosines.

    Attributes:
        name: of the encoder.
        licence: of its weights; None for the licence of the base that it comes with.
    """

    name: str
    licence: str | None
    embed: Embed
    calibration: Calibration

    def identity(self, generated: Sequence[Image.Image], others: Sequence[Image.Image]) -> Values:
        """Scores each picture by `identity_scores`; None where it, or every other photo, has no face."""
        if not others:
            raise ValueError("the identity score needs at least one photo besides the reference photo")
        return self._identity(self.embed(generated), _with_face(self.embed(others)))

    def likeness(
        self, pictures: Sequence[Image.Image], reference: Image.Image, others: Sequence[Image.Image]
    ) -> dict[str, Values]:
        """Returns `sim_reference` of each picture and, if there are other photos, `identity` and the rest.

        Args:
            pictures: generated pictures, or photos.
            reference: the photo that they were made from.
            others: further photos of the person.
        """
        seen, given, known = self.embed(pictures), self.embed([reference]), _with_face(self.embed(others))
        found = {"sim_reference": _values(seen @ given[0])}
        if others:
            found["identity"] = self._identity(seen, known)
            found["sim_target"] = _values((seen @ known.T).mean(1))
            found["copy_paste"] = _values(copy_paste(seen, known, given[0]))
        return found

    def summary(self) -> dict[str, Any]:
        """Returns name and licence, the cosines that score 1 and 0, and the photos they were measured on."""
        return {"name": self.name, "licence": self.licence, **self.calibration.model_dump()}

    def _identity(self, seen: Tensor, known: Tensor) -> Values:
        return _values(identity_scores(seen, known, self.calibration))


def _with_face(embeddings: Tensor) -> Tensor:
    return embeddings[embeddings.isfinite().all(1)]


def _values(scores: Tensor) -> Values:
    """Returns the scores as numbers; None for NaN, where there was no face to compare."""
    return [None if isnan(value) else value for value in scores.tolist()]


def judge_of(encoder: FaceEncoder) -> Judge:
    """Returns the judge that an encoder of real faces makes."""

    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        return torch.from_numpy(encoder(pictures))

    return Judge(encoder.name, encoder.licence, embed, encoder.calibration)
