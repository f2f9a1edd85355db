"""Detecting faces with OpenCV's YuNet. Its weights (MIT) come from the hub; OpenCV is an optional extra."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from hyperdreambooth.faces.landmarks import (
    MOST_MISFIT,
    TEMPLATE,
    Landmarks,
    as_landmarks,
    distance,
    laid_onto,
    misfit,
    moved,
    similarity,
)
from hyperdreambooth.files import InputError, first_line

REPOSITORY, FILE = "opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx"
LONGEST = 1024  # pixels of the longer side that YuNet sees: it was trained on faces of 10 to 300 pixels
LEAST_SCORE = 0.6  # the default for a face
_OVERLAP, _MOST = 0.3, 100  # of boxes, in non-maximum suppression; number of faces
# Looking again at a face that may be turned:
_SURE = 0.92  # the score of nearly every upright portrait; a lower one is looked at from all sides
_LEVEL = math.radians(5)  # a face turned by less is upright
_LOOKS, _LOOK_SIDE, _AROUND = 6, 320, 2.0  # the most looks, pixels per side, sides of the face's box


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
        why = first_line(error)
        what = f"{FILE} cannot be fetched from {REPOSITORY} ({why})"
        raise InputError(f"face detection: {what}; {otherwise}") from None


def check_opencv(otherwise: str = "") -> None:
    """Refuses to start without OpenCV; `otherwise` names the alternative to installing it."""
    try:
        import cv2  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        advice = f"run pip install 'hyperdreambooth[faces]'{otherwise}"
        raise InputError(f"face detection: OpenCV is not installed; {advice}") from None


@contextmanager
def _silent() -> Generator[None]:
    """Keeps OpenCV from printing: warnings would tear the progress bar, and errors are raised anyway."""
    from cv2.utils import logging

    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)


@cache
def _network(file: Path, score: float) -> Any:
    import cv2

    cv2.setNumThreads(1)  # `prepare` has a process for each core
    try:
        if not file.is_file():
            raise InputError(f"detector {file}: no such file; pass YuNet's ONNX file ({FILE})")
        with _silent():
            return cv2.FaceDetectorYN.create(str(file), "", (320, 320), score, _OVERLAP, _MOST)
    except cv2.error as error:
        why = first_line(error)
        raise InputError(f"detector {file}: OpenCV cannot read it as YuNet's ONNX file ({why})") from None


def _detect(file: Path, score: float, image: Image.Image) -> list[Face]:
    """Detects the faces of a picture, whichever way they are turned."""
    see = partial(_see, _network(file, score))
    faces = see(image) or _from_the_sides(image, see)
    largest = max((face.area for face in faces), default=0.0)
    return [straightened(image, face, see) if face.area * 9 >= largest else face for face in faces]


def _see(network: Any, image: Image.Image) -> list[Face]:
    """Detects the faces of a picture, which is scaled down if it is large."""
    zoom = min(1.0, LONGEST / max(image.size))
    shown = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
    network.setInputSize(shown.size)
    with _silent():
        _, rows = network.detect(np.ascontiguousarray(np.asarray(shown)[..., ::-1]))  # OpenCV expects BGR
    zooms = shown.width / image.width, shown.height / image.height
    return [] if rows is None else faces_of_rows(np.asarray(rows, dtype=np.float64), zooms)


def _from_the_sides(image: Image.Image, see: Detector) -> list[Face]:
    """Detects the faces of a photo that lies on its side or upside down, as cameras without EXIF leave it."""
    width, height = image.size
    for side, back, start in (
        (Image.Transpose.ROTATE_90, 1j, complex(width, 0)),
        (Image.Transpose.ROTATE_270, -1j, complex(0, height)),
        (Image.Transpose.ROTATE_180, -1 + 0j, complex(width, height)),
    ):
        if faces := see(image.transpose(side)):
            return [_moved_face(face, back, start) for face in faces]
    return []


def _moved_face(face: Face, back: complex, start: complex) -> Face:
    left, top, width, height = face.box
    (ax, ay), (bx, by) = moved(((left, top), (left + width, top + height)), back, start)
    box = (min(ax, bx), min(ay, by), abs(ax - bx), abs(ay - by))
    return Face(box, moved(face.landmarks, back, start), face.score)


def straightened(image: Image.Image, face: Face, see: Detector) -> Face:
    """Looks at a face again until it is seen upright, and returns it with the landmarks of the last look.

    YuNet finds turned faces, but places their points as if they were less turned. On portraits that were
    turned by 60 degrees, its points are off by 10 to 26 % of the head's width, after this by 2 to 6 %
    (docs/LOG.md). A face that it is not sure of is first looked at from eight sides, because it hardly ever
    sees a face that is upside down, and then takes the mouth for the eyes.
    """
    if misfit(face.landmarks) > MOST_MISFIT:
        return face  # points of no face have no upright
    seen, way = face, 1 + 0j
    if face.score < _SURE:
        for eighth in range(8):
            other = cmath.rect(1, eighth * math.pi / 4)
            found = _look(image, face, other, see)
            if found is not None and found.score > seen.score:
                seen, way = found, other
    for _ in range(_LOOKS):
        turn = similarity(seen.landmarks, TEMPLATE)[0]
        if abs(cmath.phase(turn / way)) < _LEVEL:
            break
        way = turn / abs(turn)
        seen = _look(image, seen, way, see) or seen
    return seen


def _look(image: Image.Image, face: Face, way: complex, see: Detector) -> Face | None:
    """Turns the surroundings of a face by `way`, and returns the face seen in the middle, on the photo."""
    left, top, width, height = face.box
    side = max(1.0, _AROUND * max(width, height))
    pixels = max(1, min(_LOOK_SIDE, round(side)))
    back = side / pixels / way  # from pixels of the look to the photo
    start = complex(left + width / 2, top + height / 2) - back * complex(pixels, pixels) / 2
    corners = ((0.0, 0.0), (pixels, 0.0), (pixels, pixels), (0.0, pixels))
    shown, _ = laid_onto(image, moved(corners, back, start), corners, pixels)
    middle = (pixels / 2, pixels / 2)
    nearest = min(see(shown), key=lambda one: distance(one.landmarks, middle), default=None)
    return nearest and replace(face, landmarks=moved(nearest.landmarks, back, start), score=nearest.score)


def faces_of_rows(rows: np.ndarray[Any, Any], zooms: tuple[float, float]) -> list[Face]:
    """Converts YuNet's rows `(n, 15)` (box, five points, score) into faces in pixels of the photo.

    `zooms` are width and height of the picture that YuNet saw over those of the photo.
    """
    scaled = rows[:, :14].reshape(-1, 7, 2) / np.asarray(zooms)
    return [
        Face(tuple(place[:2].flatten().tolist()), as_landmarks(place[2:]), float(row[14]))
        for place, row in zip(scaled, rows, strict=True)
    ]
