"""A real photograph, scikit-image's astronaut (NASA, public domain), its face measured by hand on it."""

from __future__ import annotations

import skimage.data
from PIL import Image

from hyperdreambooth.faces.detect import Face
from hyperdreambooth.faces.landmarks import Landmarks

LANDMARKS: Landmarks = ((203.9, 100.8), (246.7, 102.9), (224.8, 125.8), (203.9, 140.5), (244.7, 141.1))
BOX = (178.0, 60.0, 92.0, 118.0)


def astronaut() -> Image.Image:
    """512 × 512; it lies in scikit-image's wheel, nothing is downloaded."""
    return Image.fromarray(skimage.data.astronaut())


def scaled(zoom: float, dx: float = 0.0, dy: float = 0.0) -> Landmarks:
    """The landmarks of a resized and shifted copy."""
    return tuple((x * zoom + dx, y * zoom + dy) for x, y in LANDMARKS)


def middle(image: Image.Image) -> list[Face]:
    """A detector that always sees one face, in the middle of the picture; it travels to other processes."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    points = tuple((left + x / 512 * side, top + y / 512 * side) for x, y in LANDMARKS)
    box = (left + BOX[0] / 512 * side, top + BOX[1] / 512 * side, BOX[2] / 512 * side, BOX[3] / 512 * side)
    return [Face(box, points, 0.9)]
