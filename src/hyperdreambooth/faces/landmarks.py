"""Five points of a face: the similarity that turns them upright, the crop around them, the oval of the head.

Left and right eye, tip of the nose, left and right corner of the mouth, as seen in the picture and in its
pixels; the upper left corner is `(0, 0)`. CelebA and YuNet use this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from hyperdreambooth.faces.image import centre_square
from hyperdreambooth.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

Points: TypeAlias = Sequence[tuple[float, float]]
Landmarks: TypeAlias = tuple[tuple[float, float], ...]
"""Five `(x, y)`."""

# In sides of the crop. In this frame, an adult's head with its hair (230 mm, pupils 63 mm apart at half of
# its height) fills the oval of `face_oval`.
TEMPLATE: Landmarks = ((0.385, 0.46), (0.615, 0.46), (0.5, 0.6), (0.415, 0.72), (0.585, 0.72))
MOST_MISFIT = 0.6


def as_landmarks(value: Any) -> Landmarks:
    """Converts five pairs or ten numbers, as JSON has them, to landmarks; anything else is a `ValueError`."""
    try:
        points = np.asarray(value, dtype=np.float64).reshape(5, 2)
    except (TypeError, ValueError, OverflowError):  # JSON may hold integers too large for a float
        raise ValueError("expected five [x, y] landmarks (eyes, nose, corners of the mouth)") from None
    if not np.isfinite(points).all():
        raise ValueError("expected finite landmarks")
    return tuple((float(x), float(y)) for x, y in points)


# argmin over s, R, t of Σ ‖s R p + t - q‖²   (Umeyama 1991); in the plane s R is one complex number, and the
# least squares have a closed form without an SVD
def similarity(points: Points, onto: Points) -> tuple[complex, complex]:
    """Returns turn `a` and shift `b` that bring `a · p + b` nearest to `q`: scale and rotation only."""
    p, q = _complex(points), _complex(onto)
    around = p - p.mean()
    spread = float(np.vdot(around, around).real)
    if spread <= 1e-12:
        raise InputError("the landmarks lie on one point; expected eyes, nose and corners of the mouth")
    turn = complex(np.vdot(around, q - q.mean())) / spread
    return turn, complex(q.mean()) - turn * complex(p.mean())


def moved(points: Points, turn: complex, shift: complex) -> Landmarks:
    """Returns `turn · p + shift` for every point."""
    return tuple((float(z.real), float(z.imag)) for z in turn * _complex(points) + shift)


def stretched(points: Points, factor: float) -> Landmarks:
    """Returns the points, each moved away from their middle by a factor."""
    middle = complex(_complex(points).mean())
    return moved(points, complex(factor), (1 - factor) * middle)


def distance(points: Points, place: tuple[float, float]) -> float:
    """Returns how far the middle of the points is from a place."""
    return abs(complex(_complex(points).mean()) - complex(*place))


def _complex(points: Points) -> np.ndarray[Any, np.dtype[np.complex128]]:
    pairs = np.asarray(points, dtype=np.float64)
    return pairs[:, 0] + 1j * pairs[:, 1]


def framed(size: float, margin: float) -> Landmarks:
    """Returns the template in a crop of `size` pixels with `margin` sides of surroundings on every edge."""
    zoom = size / (1 + 2 * margin)
    return moved(TEMPLATE, complex(zoom), complex(size - zoom, size - zoom) / 2)


def misfit(points: Landmarks) -> float:
    """Returns how far the points are from the template's shape after the best similarity, 0 to 1.

    The astronaut of the tests has .03, a head thrown back .1, a profile .4, swapped eyes at least .8.
    """
    p, q = _complex(points), _complex(TEMPLATE)
    p, q = p - p.mean(), q - q.mean()
    alike = abs(np.vdot(p, q)) ** 2 / max(np.vdot(p, p).real * np.vdot(q, q).real, 1e-12)
    return 1.0 - float(alike)


def check_face(points: Landmarks, width: int, height: int) -> None:
    """Refuses points that lie outside the picture, or that no face has, for example with eyes swapped."""
    if outside(points, width, height):
        expected = "expected pixels of the upright photo"
        raise InputError(f"landmarks outside the picture of {width}×{height}; {expected}")
    check_shape(points)


def outside(points: Landmarks, width: int, height: int) -> bool:
    """Returns whether any point lies outside a picture."""
    return any(not (0 <= x <= width and 0 <= y <= height) for x, y in points)


def check_shape(points: Landmarks) -> None:
    """Refuses points whose arrangement no face has, wherever they lie."""
    if misfit(points) > MOST_MISFIT:
        order = "left eye, right eye, nose, left and right corner of the mouth"
        raise InputError(
            f"the landmarks make no face; expected {order}, left and right as seen in the picture"
        )


def laid_onto(
    image: Image.Image, points: Landmarks, places: Points, size: int
) -> tuple[Image.Image, Landmarks]:
    """Crops the square in which the points come nearest to the given places, by a similarity.

    Returns the crop of `size` pixels per side, mirrored beyond the picture's edges, and the points in it;
    `places` are in its pixels, too.
    """
    turn, shift = similarity(points, places)
    shrink = max(1, int(1 / abs(turn)))  # a box filter first: bicubic alone would skip pixels
    small = image.reduce(shrink)
    back, start = 1 / (turn * shrink), -shift / (turn * shrink)  # from pixels of the crop to `small`
    corners = np.asarray([0, size, 1j * size, size + 1j * size]) * back + start
    patch, left, top = _mirrored(small, corners)
    start -= complex(left, top)
    plan = (back.real, -back.imag, start.real, back.imag, back.real, start.imag)
    crop = patch.transform((size, size), Image.Transform.AFFINE, plan, Image.Resampling.BICUBIC)
    return crop, moved(points, turn, shift)


def _mirrored(image: Image.Image, corners: np.ndarray[Any, Any]) -> tuple[Image.Image, int, int]:
    """Returns the part of a picture that holds the corners, mirrored beyond the edges, and its origin."""
    left, top = int(np.floor(corners.real.min())) - 2, int(np.floor(corners.imag.min())) - 2
    right, bottom = int(np.ceil(corners.real.max())) + 2, int(np.ceil(corners.imag.max())) + 2
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    pixels = np.asarray(image.crop(inside))
    rows, columns = (inside[1] - top, bottom - inside[3]), (inside[0] - left, right - inside[2])
    return Image.fromarray(np.pad(pixels, (rows, columns, (0, 0)), mode="symmetric")), left, top


def in_square(points: Landmarks, width: int, height: int) -> Landmarks:
    """Returns points in sides of the picture's centre square, which is the part that training sees."""
    side = min(width, height)
    corner = complex((width - side) // 2, (height - side) // 2)
    return moved(points, complex(1 / side), -corner / side)


def centred(image: Image.Image, points: Landmarks | None, size: int) -> tuple[Image.Image, Landmarks | None]:
    """Returns the centre square of a picture, resized, and its points there."""
    return centre_square(image, size), points and moved(in_square(points, *image.size), complex(size), 0j)


def face_oval(height: int, width: int, points: Landmarks | None = None) -> Tensor:
    """Returns a mask `(height, width)` of the head in a square crop: 1 inside, 0 outside, with a soft edge.

    `points` of the face are in sides of the square; None for the place of the head in an aligned crop.
    """
    import torch

    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    turn, shift = (1 + 0j, 0j) if points is None else similarity(points, TEMPLATE)
    x = turn.real * columns[None] - turn.imag * rows[:, None] + shift.real
    y = turn.imag * columns[None] + turn.real * rows[:, None] + shift.imag
    distance = (((y - 0.46) / 0.42).square() + ((x - 0.5) / 0.34).square()).sqrt()
    return ((1.15 - distance) / 0.3).clamp(0, 1)
