"""Which square of a photo becomes the crop, and what is put where the photo ends.

A crop has `corners`: those of the true photo in it, in sides of the crop, clockwise from the photo's upper
left one. What lies outside them is padding, which the loss of a training does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageFilter

from hyperdreambooth.faces.landmarks import TEMPLATE, Landmarks, framed, laid_onto, moved, similarity

if TYPE_CHECKING:
    from torch import Tensor

Corners: TypeAlias = tuple[tuple[float, float], ...]
"""Four `(x, y)`."""
_Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# The tightest crop that holds a whole face, from the hairline to below the chin and from ear to ear, in sides
# of the template: where its middle is, and its side. YuNet's boxes of upright faces lie within it.
_TIGHT_MIDDLE, _TIGHT_SIDE = 0.5 + 0.55j, 0.72
_BOX = ((0.24, 0.22), (0.75, 0.88))  # corners of YuNet's box, the mean of 24 upright portraits
_FRAMES, _GRID = 12, 64  # how many crops from wide to tight are tried, samples per side to measure padding
# In sides of the crop: where the photo has faded out, where only the median is left, and the blur's sigma.
_SEAM, _FADE, _BLUR = 0.02, 0.25, 0.05


def frames(size: int, margin: float) -> list[Landmarks]:
    """Returns the template in crops of `size` pixels, from the one with `margin` to the tightest."""
    places: list[Landmarks] = []
    for share in np.linspace(0, 1, _FRAMES):
        side = (1 - share) * (1 + 2 * margin) + share * _TIGHT_SIDE
        middle = (1 - share) * (0.5 + 0.5j) + share * _TIGHT_MIDDLE
        zoom = complex(size / side)
        places.append(moved(TEMPLATE, zoom, complex(size, size) / 2 - zoom * complex(middle)))
    return places


def framed_face(size: int, margin: float) -> tuple[tuple[float, float, float, float], Landmarks]:
    """Returns the box of an upright face, as YuNet draws it, and its landmarks in a crop with a margin."""
    places = framed(size, margin)
    (left, top), (right, bottom) = moved(_BOX, *similarity(TEMPLATE, places))
    return (left, top, right - left, bottom - top), places


def fitting(corners: Corners, landmarks: Landmarks, size: int, margin: float) -> Landmarks:
    """Returns where the landmarks go: in the widest crop that needs the least padding.

    `corners` are those of the true photo, in pixels of the picture.
    """

    def padding(places: Landmarks) -> float:
        return round(padded(corners_in(corners, landmarks, places, size)), 3)

    return min(frames(size, margin), key=padding)  # of equal ones, `min` takes the first


def corners_in(corners: Corners, landmarks: Landmarks, places: Landmarks, size: int) -> Corners:
    """Returns the photo's corners in sides of the crop that has the landmarks at the places."""
    turn, shift = similarity(landmarks, places)
    return moved(corners, turn / size, shift / size)


def of_picture(width: float, height: float) -> Corners:
    """Returns the corners of a whole picture."""
    return ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))


def as_corners(value: Any) -> Corners:
    """Converts four pairs, as JSON has them, to corners; anything else is a `ValueError`."""
    try:
        ends = np.asarray(value, dtype=np.float64).reshape(4, 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("expected four [x, y] corners") from None
    places = ends @ np.asarray([1, 1j])
    around = (np.roll(places, -1) - places) * (np.roll(places, -2) - np.roll(places, -1)).conj()
    if not np.isfinite(ends).all() or not (around.imag < 0).all():
        raise ValueError("expected four corners that go clockwise from the upper left")
    return tuple((float(x), float(y)) for x, y in ends)


def padded(corners: Corners) -> float:
    """Returns the share of a crop that lies outside the photo, 0 to 1."""
    return float((depth(corners, _GRID) < 0).mean())


def depth(corners: Corners, side: int) -> _Array:
    """Returns how deep each of `side` × `side` pixels lies in the photo, in sides; below 0 it is outside."""
    ticks = (np.arange(side) + 0.5) / side
    places = ticks[None] + 1j * ticks[:, None]
    ends = np.asarray(corners, dtype=np.float64) @ np.asarray([1, 1j])
    along = np.roll(ends, -1) - ends
    inwards = 1j * along / np.abs(along)  # the corners go clockwise, and y grows downwards
    return np.min(
        [((places - end) * way.conj()).real for end, way in zip(ends, inwards, strict=True)], axis=0
    )


def photo_masks(corners: Sequence[Corners | None], like: Tensor) -> Tensor | None:
    """Returns masks `(m, 1, h, w)` of what shows nothing but photo in latents `(m, c, h, w)`.

    None where nothing is padded.

    A cell counts 0 if its middle is padding, and 1 from one cell inside the photo: the encoder's own blur
    carries padding over the edge.
    """
    import torch

    if not any(corners):
        return None
    side, masks = like.shape[-1], torch.ones_like(like[:, :1], dtype=torch.float32)
    for mask, each in zip(masks, corners, strict=True):
        if each is not None:
            mask[0] = torch.from_numpy(np.clip(depth(each, side) * side, 0, 1))
    return masks


def cut(
    image: Image.Image, corners: Corners, landmarks: Landmarks, places: Landmarks, size: int
) -> tuple[Image.Image, Landmarks, Corners]:
    """Cuts out the crop that has the landmarks at the places; returns it, the points and the photo's corners.

    Outside the photo the mirrored photo is blurred and fades towards the photo's median colour, so that the
    border has no edge and no second face.
    """
    crop, points = laid_onto(image, landmarks, places, size)
    inside = corners_in(corners, landmarks, places, size)
    deep = depth(inside, size)
    if deep.min() < 0:
        crop = _faded(crop, deep)
    return crop, points, inside


def _faded(crop: Image.Image, deep: _Array) -> Image.Image:
    pixels = np.asarray(crop, dtype=np.float32)
    blurred = np.asarray(crop.filter(ImageFilter.GaussianBlur(_BLUR * crop.width)), dtype=np.float32)
    median = np.median(pixels[deep >= 0], axis=0) if (deep >= 0).any() else np.float32(127)
    away = np.maximum(-deep, 0)[..., None].astype(np.float32)
    seam, fade = np.minimum(away / _SEAM, 1), np.minimum(away / _FADE, 1)
    border = (1 - fade) * blurred + fade * median
    return Image.fromarray(((1 - seam) * pixels + seam * border).round().astype(np.uint8))
