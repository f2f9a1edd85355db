"""Finding faces: OpenCV's YuNet, whose weights (MIT) are fetched from the hub once. OpenCV is an extra."""

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
LONGEST = 1024  # pixels of the longer side that YuNet is shown: it was trained on faces of 10 to 300
LEAST_SCORE = 0.6  # of a face, where nobody says otherwise
_OVERLAP, _MOST = 0.3, 100  # of non-maximum suppression; faces


@dataclass(frozen=True)
class Face:
    """A face in pixels of the photo: `box` is left, top, width, height; `score` the detector's confidence."""

    box: tuple[float, float, float, float]
    landmarks: Landmarks
    score: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return self.box[2] * self.box[3]

    def __str__(self) -> str:
        left, top, width, height = (round(number) for number in self.box)
        return f"{width}×{height} at {left},{top}"


Detector: TypeAlias = Callable[[Image.Image], Sequence[Face]]
"""An upright RGB picture → the faces in it."""


def yunet(file: Path, score: float) -> Detector:
    """The detector of an ONNX file. It travels to other processes, which read the file anew.

    Args:
        file: YuNet, as the hub has it.
        score: least confidence.

    Raises:
        InputError: no such file, or OpenCV cannot read it.
    """
    _network(file, score)
    return partial(_detect, file, score)


def fetch_yunet(otherwise: str) -> Path:
    """YuNet's file in the hub's cache, downloaded at the first call.

    Args:
        otherwise: what to do where it cannot be had.

    Raises:
        InputError: not there, and no way to get it.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, FILE))
    except (OSError, ValueError) as error:  # the hub's and the network's errors are of these
        why = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(
            f"face detection: {FILE} cannot be fetched from {REPOSITORY} ({why}); {otherwise}"
        ) from None


def check_opencv(otherwise: str = "") -> None:
    """Says what to install, before the work.

    Args:
        otherwise: what else would do.

    Raises:
        InputError: OpenCV is missing.
    """
    try:
        import cv2  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise InputError(
            "face detection: OpenCV is not installed; run pip install 'hyperdreambooth[faces]'" + otherwise
        ) from None


@cache
def _network(file: Path, score: float) -> Any:
    """OpenCV's detector."""
    import cv2

    try:
        if not file.is_file():
            raise InputError(f"detector {file}: no such file; pass YuNet's ONNX file ({FILE})")
        return cv2.FaceDetectorYN.create(str(file), "", (320, 320), score, _OVERLAP, _MOST)
    except cv2.error as error:
        why = str(error).strip().splitlines()[0][:120]
        raise InputError(f"detector {file}: OpenCV cannot read it as YuNet's ONNX file ({why})") from None


def _detect(file: Path, score: float, image: Image.Image) -> list[Face]:
    """Faces of a picture, which is shown smaller where it is large."""
    network, zoom = _network(file, score), min(1.0, LONGEST / max(image.size))
    shown = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
    network.setInputSize(shown.size)
    _, rows = network.detect(np.ascontiguousarray(np.asarray(shown)[..., ::-1]))  # OpenCV thinks in BGR
    zooms = shown.width / image.width, shown.height / image.height
    return [] if rows is None else faces_of_rows(np.asarray(rows, dtype=np.float64), zooms)


def faces_of_rows(rows: np.ndarray[Any, Any], zooms: tuple[float, float]) -> list[Face]:
    """YuNet's answer `(n, 15)`, box, five points, score, in pixels of the photo.

    Args:
        rows: in pixels of the picture as it was shown.
        zooms: its width and height over the photo's.
    """
    scaled = rows[:, :14].reshape(-1, 7, 2) / np.asarray(zooms)
    return [
        Face(tuple(place[:2].flatten().tolist()), as_landmarks(place[2:]), float(row[14]))
        for place, row in zip(scaled, rows, strict=True)
    ]
