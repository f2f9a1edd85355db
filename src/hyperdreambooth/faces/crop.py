"""Cropping one face from one photo, or saying in one line why that is not possible."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.detect import Detector, Face
from hyperdreambooth.faces.landmarks import (
    Landmarks,
    centred,
    check_face,
    check_shape,
    framed,
    laid_onto,
    outside,
    similarity,
)
from hyperdreambooth.files import InputError

_MEASURED_AT = 256


def crop_face(
    image: Image.Image, landmarks: Landmarks | None, config: PrepareConfig, detect: Detector | None
) -> tuple[Image.Image, Landmarks | None]:
    """Returns the crop of an upright RGB picture, and the face's landmarks in it.

    With landmarks, or for photos that are already cropped, nothing is detected.

    Raises:
        InputError: there is no face or several, or it is cut off, too small or blurred. The message does not
            name the photo.
    """
    if landmarks is not None:
        check_face(landmarks, *image.size)
    if config.already_cropped:
        _check_side(min(image.size), config)
        crop, points = centred(image, landmarks, config.size)
        if points is not None and outside(points, config.size, config.size):
            advice = "crop the photo to the face, or leave out --already-cropped"
            raise InputError(f"the face's landmarks lie outside the centre square; {advice}")
    else:
        if landmarks is None:
            landmarks = _choose(detect(image) if detect else (), config).landmarks
            check_shape(landmarks)
        places = framed(config.size, config.margin)
        _check_side(config.size / abs(similarity(landmarks, places)[0]), config)
        crop, points = laid_onto(image, landmarks, places, config.size)
    if config.sharpness and (found := sharpness(crop)) < config.sharpness:
        limit = f"expected at least {config.sharpness:g}; use a sharper photo, or lower sharpness"
        raise InputError(f"blurred: sharpness {found:.1f}, {limit}")
    return crop, points


def _choose(faces: Any, config: PrepareConfig) -> Face:
    """Returns the largest face, or refuses the photo."""
    found: list[Face] = sorted(faces, key=lambda face: face.area, reverse=True)
    if not found:
        raise InputError("no face found; crop it by hand and pass --already-cropped, or lower score")
    if len(found) > 1 and config.several == "refuse":
        boxes = ", ".join(str(face) for face in found)
        raise InputError(f"{len(found)} faces found ({boxes}); crop to one, or --set several=largest")
    return found[0]


def _check_side(side: float, config: PrepareConfig) -> None:
    """Refuses a crop that would be enlarged from too few pixels."""
    if side < config.min_side:
        limit = f"expected at least {config.min_side}; use a larger photo, or lower min_side"
        raise InputError(f"too small: the crop would have {side:.0f} pixels per side, {limit}")


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
