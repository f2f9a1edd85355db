"""What pixels alone tell: how much one person's pictures differ, and what they copy of the reference photo.

All of it looks at pictures of 32×32 pixels: layout, light and colour, no detail.
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
    """Pictures as `(m, 3, SIDE, SIDE)` in [-1, 1]."""
    return torch.stack([to_pixels(image, SIDE) for image in images])


def diversity(images: Sequence[Image.Image]) -> float | None:
    """Mean absolute difference of every two pictures: 0 all the same, 1 black beside white; None for one."""
    if len(images) < 2:
        return None
    flat = thumbnails(images).flatten(1)
    apart = torch.cdist(flat, flat, p=1) / flat.shape[1] / 2
    return float(apart.sum() / (len(images) * (len(images) - 1)))


def copied(images: Sequence[Image.Image], reference: Image.Image, where: Tensor) -> list[float]:
    """Pearson's correlation of each picture's brightness with the reference photo's: 1 is the photo again.

    Args:
        images: pictures of the person.
        reference: the photo that the person was made from.
        where: weights `(SIDE, SIDE)` of the places that count.
    """
    grey = thumbnails([reference, *images]).mean(1).flatten(1).double()
    weights = where.flatten().double() / where.sum()
    centred = grey - (grey * weights).sum(1, keepdim=True)
    spread = (centred.square() * weights).sum(1).sqrt().clamp_min(1e-9)
    return ((centred[1:] * centred[0] * weights).sum(1) / spread[1:] / spread[0]).tolist()


def pose_copied(images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
    """`copied` inside the oval where an aligned crop has its face: pose, light and expression."""
    return copied(images, reference, face_oval(SIDE, SIDE))


def background_copied(images: Sequence[Image.Image], reference: Image.Image) -> list[float]:
    """`copied` outside that oval."""
    return copied(images, reference, 1 - face_oval(SIDE, SIDE))
