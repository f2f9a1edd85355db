"""Strangers, copies and reference photos: on vectors and pictures whose answer is known."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import portrait
from hyperdreambooth.faces.check import (
    Stranger,
    duplicates,
    look,
    only_face,
    reference,
    strangers,
    vectors_of,
)
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.journal import Record
from hyperdreambooth.faces.landmarks import framed
from hyperdreambooth.faces.prepare import prepare_folder

SCALE = (0.2, 0.9)  # cosines of two strangers, and of two photos of one person


def vector(person: int, likeness: float = 1.0) -> np.ndarray:
    """A face of the person that is so like the others."""
    cosine = SCALE[0] + likeness * (SCALE[1] - SCALE[0])
    own, apart = np.eye(16)[person], np.eye(16)[8 + np.random.default_rng(person).integers(8)]
    return cosine * own + np.sqrt(1 - cosine**2) * apart


def test_the_one_crop_of_somebody_else() -> None:
    people = {"ana": ["ana/1", "ana/2", "ana/3"], "bob": ["bob/1", "bob/2"]}
    vectors = {
        "ana/1": vector(0),
        "ana/2": vector(1),
        "ana/3": vector(0),
        "bob/1": vector(1),
        "bob/2": vector(1),
    }
    (found,) = strangers(people, vectors, SCALE)
    assert (found.crop, found.like) == ("ana/2", "bob") and found.likeness < 0.3
    vectors["ana/2"] = vector(2)
    (found,) = strangers(people, vectors, SCALE)
    assert (found.crop, found.like) == ("ana/2", None)
    del vectors["ana/2"]  # the encoder saw no face
    assert strangers(people, vectors, SCALE) == []


def test_of_two_that_are_unlike_the_second_is_named() -> None:
    found = strangers({"ana": ["ana/1", "ana/2"]}, {"ana/1": vector(0), "ana/2": vector(1)}, SCALE)
    assert [one.crop for one in found] == ["ana/2"] and isinstance(found[0], Stranger)
    assert strangers({"ana": ["ana/1"], "bob": []}, {"ana/1": vector(0)}, SCALE) == []


def astronaut_at(zoom: float) -> Image.Image:
    return portrait.astronaut().crop((0, 0, round(512 * zoom), round(512 * zoom)))


def saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize(
    "copy",
    [
        lambda image: saved(image, 20),
        ImageOps.mirror,
        lambda image: saved(ImageOps.mirror(image).resize((200, 200)), 40),
        lambda image: ImageEnhance.Brightness(image).enhance(1.2),
        lambda image: image.convert("L").convert("RGB"),
    ],
)
def test_copies_are_found_within_and_across_people(copy: Callable[[Image.Image], Image.Image]) -> None:
    images = [astronaut_at(1), astronaut_at(0.7), copy(astronaut_at(1)), Image.new("RGB", (64, 64), "red")]
    names = ["ana/1", "ana/2", "bob/1", "bob/2"]
    records = [Record(name, name, "", look=look(image)) for name, image in zip(names, images, strict=True)]
    assert duplicates(records) == [["ana/1", "bob/1"]]
    assert duplicates(reversed(records)) == [["bob/1", "ana/1"]]
    records[2] = replace(records[2], reason="dropped")
    assert duplicates(records) == [] == duplicates([])


def test_faces_of_one_photo_are_no_copies() -> None:
    faces = [Record("ana/1", "x", "", number=number, look=look(astronaut_at(1))) for number in (1, 2)]
    assert duplicates(faces) == []


def test_the_reference_is_sharp_frontal_alone_and_whole() -> None:
    best = Record("ana/best", "", "", landmarks=framed(64, 0.1), score=0.95, sharpness=300.0)
    turned = ((20.0, 30.0), (30.0, 30.0), (18.0, 40.0), (21.0, 48.0), (29.0, 48.0))
    corners = ((0.2, 0.0), (1.0, 0.0), (1.0, 1.0), (0.2, 1.0))
    worse = [
        replace(best, item="ana/a", sharpness=20.0), replace(best, item="ana/b", landmarks=turned),
        replace(best, item="ana/c", faces=2), replace(best, item="ana/d", score=0.7),
        replace(best, item="ana/e", corners=corners),
    ]  # fmt: skip
    assert reference([*worse, best]) == "ana/best" and reference([best]) == "ana/best"
    assert reference([*worse[:1], best], odd=["ana/best"]) == "ana/a"


def test_the_encoder_is_shown_each_aligned_face_once(tmp_path: Path) -> None:
    home = tmp_path / "photos" / "ana"
    home.mkdir(parents=True)
    for number in (0, 20):
        portrait.astronaut().crop((number, 0, 512, 512 - number)).save(home / f"{number}.png")
    config = PrepareConfig(size=128)
    records = prepare_folder(tmp_path / "photos", tmp_path / "out", config, 1, portrait.middle)
    shown: list[Image.Image] = []

    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        shown.extend(pictures)
        rows = [np.eye(3)[number] for number, _ in enumerate(pictures)]
        return np.array([np.full(3, np.nan), *rows[1:]], dtype=np.float32)

    for _ in range(2):
        vectors = vectors_of(tmp_path / "out", records, embed, tmp_path / "cache")
        assert list(vectors) == ["ana/20"] and vectors["ana/20"].tolist() == [0, 1, 0]
    assert len(shown) == 2 and shown[0].size == (256, 256)
    (face,) = only_face(shown[0])
    assert face.landmarks == framed(256, 0.1)
    assert vectors_of(tmp_path / "out", [], embed, tmp_path / "cache") == {}
