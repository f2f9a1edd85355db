"""The detector's answer in the photo's own pixels, and one line where there is no detector."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hyperdreambooth.faces import detect
from hyperdreambooth.faces.detect import Face, check_opencv, faces_of_rows, fetch_yunet, yunet
from hyperdreambooth.files import InputError


def test_rows_of_the_detector_by_hand() -> None:
    row = [10, 20, 30, 40, 12, 24, 34, 26, 22, 36, 14, 48, 30, 50, 0.75]
    (face,) = faces_of_rows(np.array([row], dtype=np.float32), (0.5, 0.25))
    assert face.box == (20, 80, 60, 160) and face.area == 60 * 160
    assert face.landmarks == ((24, 96), (68, 104), (44, 144), (28, 192), (60, 200))
    assert face.score == 0.75 and str(face) == "60×160 at 20,80"
    assert faces_of_rows(np.zeros((0, 15)), (1.0, 1.0)) == []


class Network:
    """Stands for OpenCV's YuNet: sees where the picture is red, and keeps what it was shown."""

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, shown: np.ndarray) -> tuple[int, np.ndarray | None]:
        self.shown = shown
        rows, columns = np.nonzero(shown[..., 2] > 200)
        if not len(rows):
            return 0, None
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        return 1, np.array([[left, top, right - left, bottom - top, *[left, top] * 5, 0.9]], dtype=np.float32)


def test_large_photos_are_shown_smaller_and_in_bgr(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    monkeypatch.setattr(detect, "_network", lambda file, score: network)
    image = Image.new("RGB", (4096, 2048), (0, 0, 90))
    image.paste((255, 0, 0), (1000, 400, 1600, 1000))
    (face,) = yunet(Path("any.onnx"), 0.5)(image)
    assert network.size == (1024, 512) and network.shown.shape == (512, 1024, 3)
    assert tuple(network.shown[0, 0]) == (90, 0, 0) and network.shown.flags.c_contiguous
    assert face.box == pytest.approx((1000, 400, 600, 600), abs=8)
    assert yunet(Path("any.onnx"), 0.5)(Image.new("RGB", (60, 40))) == [] and network.size == (60, 40)


def test_a_file_that_is_no_detector(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    for name, words in {
        "bad.onnx": "OpenCV cannot read it",
        "none.onnx": "no such file; pass YuNet's",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            yunet(tmp_path / name, 0.5)(Image.new("RGB", (64, 64)))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_offline_says_what_to_pass() -> None:
    """The tests' own environment is offline: nothing is asked of the network here."""
    with pytest.raises(InputError, match=r"cannot be fetched .*; pass --detector FILE") as caught:
        fetch_yunet("pass --detector FILE")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_without_opencv_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *rest: Any) -> Any:
        if name == "cv2":
            raise ImportError("no cv2")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(InputError, match=r"pip install 'hyperdreambooth\[faces\]', or draw none"):
        check_opencv(", or draw none")


def test_faces_are_told_by_their_size() -> None:
    face = Face((0.4, 0.6, 10.2, 20.0), ((0.0, 0.0),) * 5, 1.0)
    assert face.area == pytest.approx(204) and str(face) == "10×20 at 0,1"
