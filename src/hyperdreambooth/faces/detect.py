"""Detecting faces with OpenCV's YuNet. Its weights (MIT) come from the hub; OpenCV is an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from hyperdreambooth.faces.landmarks import Landmarks, as_landmarks
from hyperdreambooth.files import InputError

REPOSITORY, FILE = "opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx"
LONGEST = 1024  # pixels of the longer side that YuNet sees: it was trained on faces of 10 to 300 pixels
LEAST_SCORE = 0.6  # the default for a face
_OVERLAP, _MOST = 0.3, 100  # of boxes, in non-maximum suppression; number of faces


@dataclass(frozen=True)
class Face:
    """A face in pixels of the photo: `box` is left, top, width, height; `score` is the confidence."""

    box: tuple[float, float, float, float]
    landmarks: Landmarks
    score: float

    @property
    def area(self) -> float:
        """The area of the box in square pixels."""
        return self.box[2] * self.box[3]

    def __str__(self) -> str:
        left, top, width, height = (round(number) for number in self.box)
        return f"{width}×{height} at {left},{top}"


Detector: TypeAlias = Callable[[Image.Image], Sequence[Face]]
"""An upright RGB picture → the faces in it."""


def yunet(file: Path, score: float) -> Detector:
    """Returns the detector of YuNet's ONNX file. It can be pickled: another process reads the file again."""
    _network(file, score)
    return partial(_detect, file, score)


def fetch_yunet(otherwise: str) -> Path:
    """Returns YuNet's file in the hub's cache, which the first call downloads; `otherwise` is advice."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, FILE))
    except (OSError, ValueError) as error:  # errors of hub and network derive from these
        why = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        what = f"{FILE} cannot be fetched from {REPOSITORY} ({why})"
        raise InputError(f"face detection: {what}; {otherwise}") from None


def check_opencv(otherwise: str = "") -> None:
    """Refuses to start without OpenCV; `otherwise` names the alternative to installing it."""
    try:
        import cv2  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        advice = f"run pip install 'hyperdreambooth[faces]'{otherwise}"
        raise InputError(f"face detection: OpenCV is not installed; {advice}") from None


@cache
def _network(file: Path, score: float) -> Any:
    import cv2

    try:
        if not file.is_file():
            raise InputError(f"detector {file}: no such file; pass YuNet's ONNX file ({FILE})")
        return cv2.FaceDetectorYN.create(str(file), "", (320, 320), score, _OVERLAP, _MOST)
    except cv2.error as error:
        why = str(error).strip().splitlines()[0][:120]
        raise InputError(f"detector {file}: OpenCV cannot read it as YuNet's ONNX file ({why})") from None


def _detect(file: Path, score: float, image: Image.Image) -> list[Face]:
    """Detects the faces of a picture, which is scaled down if it is large."""
    network, zoom = _network(file, score), min(1.0, LONGEST / max(image.size))
    shown = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
    network.setInputSize(shown.size)
    _, rows = network.detect(np.ascontiguousarray(np.asarray(shown)[..., ::-1]))  # OpenCV expects BGR
    zooms = shown.width / image.width, shown.height / image.height
    return [] if rows is None else faces_of_rows(np.asarray(rows, dtype=np.float64), zooms)


def faces_of_rows(rows: np.ndarray[Any, Any], zooms: tuple[float, float]) -> list[Face]:
    """Converts YuNet's rows `(n, 15)` (box, five points, score) into faces in pixels of the photo.

    `zooms` are width and height of the picture that YuNet saw over those of the photo.
    """
    scaled = rows[:, :14].reshape(-1, 7, 2) / np.asarray(zooms)
    return [
        Face(tuple(place[:2].flatten().tolist()), as_landmarks(place[2:]), float(row[14]))
        for place, row in zip(scaled, rows, strict=True)
    ]
