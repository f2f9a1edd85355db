"""Who is on a photo: a flat folder of one person, and several faces in one photo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter
from pydantic import ValidationError

import portrait
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.faces.detect import Face
from hyperdreambooth.faces.prepare import prepare_folder
from hyperdreambooth.files import InputError

CONFIG = PrepareConfig(size=64)


def test_a_flat_folder_is_announced_before_the_work_and_takes_a_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for name in ("1.png", "2.png"):
        portrait.astronaut().save(source / name)

    def messages(source: Path, out: str, **fields: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "hyperdreambooth"):
            config = CONFIG.model_copy(update=fields)
            prepare_folder(source, tmp_path / out, config, 1, portrait.middle)
        return [one.message for one in caplog.records if not one.message.startswith("prepare ")]

    (line,) = messages(source, "flat")
    assert line.endswith(
        "each photo is taken as a person of its own; pass --person NAME if they all show one person"
    )
    assert messages(source, "named", person="Ana B") == []
    assert {name: len(photos) for name, photos in read_faces(tmp_path / "named").items()} == {"Ana B": 2}
    assert messages(source / "1.png", "one") == []
    people = tmp_path / "people" / "ana"
    people.mkdir(parents=True)
    portrait.astronaut().save(people / "1.png")
    portrait.astronaut().save(people / "2.png")
    assert messages(people.parent, "people-out") == []
    with pytest.raises(InputError, match="has an identity already; leave out --person"):
        messages(people.parent, "twice", person="ana")


@pytest.mark.parametrize("name", ["", " ", "a/b", ".a", "a:b"])
def test_what_is_no_name_of_a_person(name: str) -> None:
    with pytest.raises(ValidationError, match="expected a name that a folder can have"):
        PrepareConfig(person=name)


def beside(image: Any) -> list[Face]:
    """Two faces in a wide picture, one in any other."""
    (face,) = portrait.middle(image)
    if image.width < 1.5 * image.height:
        return [face]
    left, right = (
        Face(
            (face.box[0] + way * 256, *face.box[1:]),
            tuple((x + way * 256, y) for x, y in face.landmarks),
            0.9,
        )
        for way in (-1, 1)
    )
    return [right, left]


def test_every_face_of_a_photo_is_a_crop_or_has_a_reason(tmp_path: Path) -> None:
    """And follows the photo when it changes; `a-1.png` and the first face of `a.png` have other names."""
    home, out = tmp_path / "photos" / "ana", tmp_path / "out"
    home.mkdir(parents=True)
    image = portrait.astronaut()
    pair = Image.new("RGB", (1024, 512))
    pair.paste(image, (0, 0))
    pair.paste(image.filter(ImageFilter.GaussianBlur(25)), (512, 0))
    pair.save(home / "a.png")
    image.save(home / "a-1.png")
    config = CONFIG.model_copy(update={"several": "all"})

    def prepared() -> dict[str, str]:
        records = prepare_folder(tmp_path / "photos", out, config, 1, beside)
        assert prepare_folder(tmp_path / "photos", out, config, 1, beside) == records
        assert sorted(one.name for one in records if one.kept) == sorted(
            f"ana/{path.stem}" for path in (out / "ana").glob("*.png")
        )
        return {one.name: one.reason[:22] for one in records}

    assert prepared() == {"ana/a-1": "", "ana/a-2": "face 2 of 2: blurred: ", "ana/a-1-1": ""}
    pair.paste(image, (512, 0))
    pair.save(home / "a.png")
    assert prepared() == {"ana/a-1": "", "ana/a-2": "", "ana/a-1-1": ""}
    image.save(home / "a.png")
    assert prepared() == {"ana/a-1": "", "ana/a-1-1": ""}
