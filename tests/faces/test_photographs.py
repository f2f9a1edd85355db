"""A real detector on real photographs: found, aligned, one face in every crop. All: benchmarks/photos.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shared
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.crop import Crop, choose, crop_face, main_faces
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.faces.detect import Face, yunet
from hyperdreambooth.faces.landmarks import Landmarks, framed, laid_onto, moved
from hyperdreambooth.faces.prepare import prepare_folder
from hyperdreambooth.files import InputError

pytestmark = [shared.needs_photos, shared.needs_yunet]
CONFIG = PrepareConfig(size=256)
FEW = (0, 7, 16)  # of the 24: turned by 3 and 11 degrees, and a face that fills the photo


def portrait(number: int) -> Image.Image:
    """One of 24 portraits of 24 people, 1024 pixels per side."""
    with Image.open(sorted((shared.SHARED / "photos").glob("*.jpg"))[number]) as image:
        return image.convert("RGB")


def faces(image: Image.Image) -> Sequence[Face]:
    pytest.importorskip("cv2")
    return yunet(shared.YUNET, 0.6)(image)


def cropped(image: Image.Image) -> Crop:
    (face,) = choose(main_faces(faces(image), CONFIG), CONFIG)
    return crop_face(image, face.landmarks, CONFIG)


@pytest.mark.parametrize("number", range(24))
def test_a_portrait_is_aligned_as_arithmetic_says(number: int) -> None:
    """Wherever the points are in the crop, they are the best similarity's; seen again they are there."""
    image = portrait(number)
    crop = cropped(image)
    (seen,) = faces(crop.picture)
    assert crop.landmarks is not None and crop.corners is None
    assert np.abs(np.subtract(seen.landmarks, crop.landmarks)).max() < 0.03 * 256
    (face,) = choose(main_faces(faces(image), CONFIG), CONFIG)
    matrix, onto = [], []
    for (x, y), (u, v) in zip(face.landmarks, crop.landmarks, strict=True):
        matrix += [[x, -y, 1, 0], [y, x, 0, 1]]
        onto += [u, v]
    found = np.linalg.lstsq(np.array(matrix), np.array(onto), rcond=None)[0]
    assert np.abs(np.array(matrix) @ found - onto).max() < 0.01  # a similarity, and nothing else
    eyes = np.subtract(*crop.landmarks[1::-1])
    assert abs(math.degrees(math.atan2(eyes[1], eyes[0]))) < 5


@pytest.mark.parametrize("degrees", [45, 90, 180])
def test_the_points_of_a_turned_face_are_those_of_the_upright_one(degrees: int) -> None:
    """A detector alone places the points of turned faces as if they were less turned."""
    image = portrait(7).resize((512, 512))
    turn = np.exp(-1j * np.radians(degrees))
    wanted = moved(
        choose(faces(image), CONFIG)[0].landmarks, complex(turn), complex((256 + 256j) * (1 - turn))
    )
    (face,) = choose(main_faces(faces(image.rotate(degrees)), CONFIG), CONFIG)
    head = 512 / 576 * 288  # its head is 576 of 1024 pixels wide
    assert np.abs(np.subtract(face.landmarks, wanted)).max() < 0.06 * head


def tight(image: Image.Image, kind: str) -> Image.Image:
    left, top, width, height = max(faces(image), key=lambda face: face.area).box
    ends = {
        "box": (left, top, left + width, top + height),
        "more right and below": (left, top, left + 1.3 * width, top + 1.3 * height),
        "left edge": (left, 0, image.width, image.height),
        "upper edge": (0, top, image.width, image.height),
        "lower edge": (0, 0, image.width, top + height),
        "left half": (0, 0, left + width / 2, image.height),
        "right half": (left + width / 2, 0, image.width, image.height),
        "upper half": (0, 0, image.width, top + height / 2),
        "lower half": (0, top + height / 2, image.width, image.height),
    }[kind]
    return image.crop(tuple(map(round, ends)))


@pytest.mark.parametrize("kind", ["box", "more right and below", "left edge", "upper edge", "lower edge"])
def test_no_crop_of_a_tight_photo_has_a_second_face(kind: str) -> None:
    for number in FEW:
        config = CONFIG.model_copy(update={"most_padded": 1.0})
        image = tight(portrait(number), kind)
        crop = crop_face(image, choose(main_faces(faces(image), config), config)[0].landmarks, config)
        assert len(faces(crop.picture)) == 1, number


@pytest.mark.parametrize("kind", ["left half", "right half", "upper half", "lower half"])
def test_half_a_face_is_dropped_with_its_reason(kind: str) -> None:
    for number in FEW:
        with pytest.raises(InputError, match=r"cut off|no face found"):
            cropped(tight(portrait(number), kind))


def small_face(image: Image.Image, points: Landmarks | None) -> np.ndarray:
    """The aligned face alone."""
    points = points or choose(main_faces(faces(image), CONFIG), CONFIG)[0].landmarks
    return np.asarray(laid_onto(image, points, framed(48, -0.15), 48)[0], dtype=float)


def group(numbers: Sequence[int]) -> Image.Image:
    sheet = Image.new("RGB", (512 * len(numbers), 512))
    for place, number in enumerate(numbers):
        sheet.paste(portrait(number).resize((512, 512)), (512 * place, 0))
    return sheet


@pytest.mark.parametrize("numbers", [(0, 7), (3, 9, 20)])
def test_groups_are_refused_or_all_taken(numbers: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    home = tmp_path / "photos" / "ana"
    home.mkdir(parents=True)
    group(numbers).save(home / "a.jpg")
    config = PrepareConfig(size=256, detector=shared.YUNET)
    (refused,) = prepare_folder(tmp_path / "photos", tmp_path / "refused", config, 1)
    assert refused.reason.startswith(f"{len(numbers)} faces found") and refused.thumb
    every = config.model_copy(update={"several": "all"})
    records = prepare_folder(tmp_path / "photos", tmp_path / "all", every, 1)
    assert [(one.name, one.reason) for one in records] == [
        (f"ana/a-{k + 1}", "") for k in range(len(numbers))
    ]
    assert prepare_folder(tmp_path / "photos", tmp_path / "all", every, 1) == records
    alone = [small_face(portrait(number), None) for number in numbers]
    for place, one in enumerate(records):  # from left to right
        with Image.open(tmp_path / "all" / f"{one.name}.png") as crop:
            found = small_face(crop, one.landmarks)
        assert int(np.argmin([np.abs(found - other).mean() for other in alone])) == place
    group(numbers[:1]).save(home / "a.jpg")
    assert len(prepare_folder(tmp_path / "photos", tmp_path / "all", every, 1)) == 1
    assert [photo.path.name for photo in read_faces(tmp_path / "all")["ana"]] == ["a-1.png"]


def test_opencv_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """It would print into the progress bar."""
    pytest.importorskip("cv2")
    yunet(shared.YUNET, 0.61)(portrait(0))  # a score of its own, so that the network is made anew
    assert capfd.readouterr() == ("", "")


def test_padding_is_in_the_metadata(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    home = tmp_path / "photos" / "ana"
    home.mkdir(parents=True)
    tight(portrait(0), "more right and below").save(home / "a.png")
    prepare_folder(
        tmp_path / "photos", tmp_path / "out", CONFIG.model_copy(update={"detector": shared.YUNET}), 1
    )
    (line,) = (tmp_path / "out" / "ana" / "metadata.jsonl").read_text().splitlines()
    (photo,) = read_faces(tmp_path / "out")["ana"]
    assert photo.corners is not None and json.loads(line)["corners"] == [list(one) for one in photo.corners]
