"""Photos as people drop them: what becomes a crop, what is left out, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.dataset import read_person
from hyperdreambooth.faces.detect import yunet
from hyperdreambooth.faces.prepare import prepare_folder
from hyperdreambooth.files import InputError
from hyperdreambooth.ui.crops import crop_photos
from hyperdreambooth.ui.new_tab import named
from shared import SHARED, YUNET, needs_photos, needs_yunet


def test_without_a_detector_the_centre_is_taken_and_said(tmp_path: Path) -> None:
    Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 20).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a photo of a [V] face, smiling")
    out = tmp_path / "crops"
    out.mkdir()
    [crop] = crop_photos([tmp_path / "a.png"], out, 32, None)
    assert crop.words == "the centre of the photo" and crop.file is not None
    [photo] = read_person(out)
    assert photo.open().size == (32, 32) and photo.caption == "a photo of a [V] face, smiling"


def test_what_cannot_be_opened_is_left_out_and_named_without_its_folder(
    tmp_path: Path, micro_photos: Path
) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    out = tmp_path / "crops"
    out.mkdir()
    good = micro_photos / "person-0" / "0.png"
    torn, crop = crop_photos([tmp_path / "torn.jpg", good], out, 32, None)
    assert torn.file is None and torn.name == "torn.jpg" and str(tmp_path) not in torn.words
    assert crop.words == "the centre of the photo" and len(read_person(out)) == 1
    with pytest.raises(InputError, match=r"^no photo can be used: torn\.jpg: ") as failed:
        crop_photos([tmp_path / "torn.jpg"], out, 32, None)
    assert str(tmp_path) not in str(failed.value)


@needs_photos
@needs_yunet
def test_a_photograph_is_cropped_as_prepare_crops_it(tmp_path: Path) -> None:
    photo = min((SHARED / "photos").glob("*.jpg"))
    out, detect = tmp_path / "crops", yunet(YUNET, 0.6)
    out.mkdir()
    [crop] = crop_photos([photo], out, 128, detect)
    prepare_folder(photo, tmp_path / "prepared", PrepareConfig(size=128, sharpness=0), 1, detect)
    assert crop.file is not None and crop.words.startswith("face found")
    assert crop.file.read_bytes() == next((tmp_path / "prepared").glob("*.png")).read_bytes()
    marked, [again] = crop.shown(), crop_photos([crop.file], _new(tmp_path / "again"), 128, detect)
    assert marked is not None and marked.size == (128, 128)
    assert again.words == "taken as it is"  # a crop of the base's size is not cropped again


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("photos", "name", "last", "shown"),
    [
        (["ana_maria.jpg"], "", "", "Ana maria"),
        (["me.heic"], "Broken", "Broken", "Me"),
        (["me.heic"], "Ana", "Broken", "Ana"),
        ([], "Broken", "Broken", ""),
        ([], "Ana", "", "Ana"),
    ],
)
def test_a_new_photo_brings_its_name_unless_the_user_wrote_one(
    photos: list[str], name: str, last: str, shown: str
) -> None:
    assert named([Path(photo) for photo in photos], name, last) == [shown, "" if shown == "Ana" else shown]
