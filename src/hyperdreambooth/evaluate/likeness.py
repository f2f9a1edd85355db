"""Scores from pixels alone: how much one person's pictures differ, and what they copy of the reference photo.

All of them look at pictures of 32×32 pixels, which keep layout, light and colour but no detail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.faces.landmarks import face_oval

SIDE = 32


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """Returns pictures as `(m, 3, SIDE, SIDE)` in [-1, 1]."""
    return torch.stack([to_pixels(image, SIDE) for image in images])


def diversity(images: Sequence[Image.Image]) -> float | None:
    """Computes the mean difference of every two pictures, 1 for black and white; None for a single one."""
    if len(images) < 2:
        return None
    flat = thumbnails(images).flatten(1)
    return float(torch.pdist(flat, p=1).mean() / flat.shape[1] / 2)


def copied(images: Sequence[Image.Image], reference: Image.Image, where: Tensor) -> list[float]:
    """Computes Pearson's correlation of each picture's brightness with the reference photo's.

    The places count by the weights `where`, `(SIDE, SIDE)`.
    """
    grey = thumbnails([reference, *images]).mean(1).flatten(1).double()
    weights = where.flatten().double() / where.sum()
    centred = grey - (grey * weights).sum(1, keepdim=True)
    spread = (centred.square() * weights).sum(1).sqrt().clamp_min(1e-9)
    return ((centred[1:] * centred[0] * weights).sum(1) / spread[1:] / spread[0]).tolist()


def pose_copied(images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
    """Computes `copied` inside the oval of an aligned crop's face: pose, light and expression."""
    return copied(images, reference, face_oval(SIDE, SIDE))


def background_copied(images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
    """Computes `copied` outside that oval."""
    return copied(images, reference, 1 - face_oval(SIDE, SIDE))
