"""Cropping the faces of one photo, or saying in one line why that is not possible."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.detect import Face
from hyperdreambooth.faces.frame import Corners, cut, fitting, of_picture, padded
from hyperdreambooth.faces.landmarks import (
    Landmarks,
    centred,
    check_face,
    check_shape,
    outside,
    similarity,
    stretched,
)
from hyperdreambooth.files import InputError

_MEASURED_AT = 256
_ROOM = 1.25  # the landmarks, stretched by it, hold the brows, both eyes and the lips


@dataclass(frozen=True)
class Crop:
    """A crop, and what is known about it."""

    picture: Image.Image
    landmarks: Landmarks | None  # in pixels of the crop
    corners: Corners | None  # of the true photo, in sides of the crop; None where nothing is padding
    sharpness: float


def main_faces(faces: Sequence[Face], config: PrepareConfig) -> list[Face]:
    """Returns the faces without those of passers-by, which are much smaller than the largest."""
    largest = max((face.area for face in faces), default=0.0)
    return [face for face in faces if face.area >= config.second_face**2 * largest]


def choose(faces: Sequence[Face], config: PrepareConfig) -> list[Face]:
    """Returns the main faces to crop, from left to right.

    Raises:
        InputError: there is no face, or there are several where one was expected.
    """
    if not faces:
        raise InputError("no face found; crop it by hand and pass --already-cropped, or lower score")
    if config.several == "largest":
        return [max(faces, key=lambda face: face.area)]
    if len(faces) > 1 and config.several == "refuse":
        boxes = ", ".join(str(face) for face in sorted(faces, key=lambda face: -face.area))
        advice = "crop to one, or pass --several largest or all"
        raise InputError(f"{len(faces)} faces found ({boxes}); {advice}")
    return sorted(faces, key=lambda face: face.box[0])


def crop_face(
    image: Image.Image, landmarks: Landmarks | None, config: PrepareConfig, corners: Corners | None = None
) -> Crop:
    """Crops one face of an upright RGB picture.

    Args:
        image: the photo, or an earlier crop of it.
        landmarks: the face's; None only for photos that are already cropped.
        config: the settings.
        corners: those of the true photo in a padded crop, see `faces/frame.py`.

    Raises:
        InputError: the face is cut off, too small, turned too far or blurred. The message does not name the
            photo.
    """
    if config.already_cropped or landmarks is None:
        crop, points, inside = _centre(image, landmarks, config, corners)
    else:
        crop, points, inside = _aligned(image, landmarks, config, corners)
    if (found := sharpness(crop)) < config.sharpness:
        limit = f"expected at least {config.sharpness:g}; use a sharper photo, or lower sharpness"
        raise InputError(f"blurred: sharpness {found:.1f}, {limit}")
    return Crop(crop, points, inside if inside and padded(inside) else None, found)


def _centre(
    image: Image.Image, landmarks: Landmarks | None, config: PrepareConfig, corners: Corners | None
) -> tuple[Image.Image, Landmarks | None, Corners | None]:
    """Takes the centre square of a photo that is already a crop of a face."""
    if landmarks is not None:
        check_face(landmarks, *image.size)
    _check_zoom(config.size / min(image.size), config)
    crop, points = centred(image, landmarks, config.size)
    if points is not None and outside(points, config.size, config.size):
        advice = "crop the photo to the face, or leave out --already-cropped"
        raise InputError(f"the face's landmarks lie outside the centre square; {advice}")
    return crop, points, corners


def _aligned(
    image: Image.Image, landmarks: Landmarks, config: PrepareConfig, corners: Corners | None
) -> tuple[Image.Image, Landmarks, Corners]:
    """Turns a face upright and crops it, as wide as the photo allows."""
    check_shape(landmarks)
    if outside(stretched(landmarks, _ROOM), *image.size):
        raise InputError(f"cut off: part of the face lies outside the photo of {image.width}×{image.height}")
    photo = of_picture(*image.size)
    if corners is not None:
        photo = tuple((x * image.width, y * image.height) for x, y in corners)
    places = fitting(photo, landmarks, config.size, config.margin)
    turn, _ = similarity(landmarks, places)
    _check_turn(math.degrees(abs(cmath.phase(turn))), config)
    _check_zoom(abs(turn), config)
    crop, points, inside = cut(image, photo, landmarks, places, config.size)
    if (share := padded(inside)) > config.most_padded:
        advice = "use a photo with more around the face, or raise most_padded"
        outer = f"{share:.0%} of the tightest crop lies outside the photo"
        raise InputError(f"cut off: {outer}, expected at most {config.most_padded:.0%}; {advice}")
    return crop, points, inside


def _check_turn(degrees: float, config: PrepareConfig) -> None:
    if degrees > config.most_turned:
        limit = f"expected at most {config.most_turned:g}; turn the photo, or raise most_turned"
        raise InputError(f"the face is turned by {degrees:.0f} degrees, {limit}")


def _check_zoom(zoom: float, config: PrepareConfig) -> None:
    """Refuses a crop that would be enlarged from too few pixels."""
    if zoom > config.most_enlarged:
        limit = f"expected at most {config.most_enlarged:g}; use a larger photo, or raise most_enlarged"
        raise InputError(f"too small: the face would be enlarged {zoom:.1f} times, {limit}")


def sharpness(crop: Image.Image) -> float:
    """Returns the variance of the Laplacian `4 g - (its four neighbours)` of the grey crop, 0 to 255.

    It is measured at 256 pixels per side, so that the threshold means the same for all larger sizes. A photo
    in focus has several hundred; one whose finest detail is a hundredth of the crop's side has 9.
    """
    side = min(_MEASURED_AT, *crop.size)
    grey = crop.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    g = np.asarray(grey, dtype=np.float64)
    edges = 4 * g[1:-1, 1:-1] - g[:-2, 1:-1] - g[2:, 1:-1] - g[1:-1, :-2] - g[1:-1, 2:]
    return float(edges.var())
