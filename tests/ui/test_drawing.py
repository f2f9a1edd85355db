"""Pictures of one person, of a sum, and of somebody beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studios import add, opened

from hyperdreambooth.adapter import load_adapter
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import generate_images
from hyperdreambooth.ui.draw_tab import request, seeds_of
from hyperdreambooth.ui.making import Maker
from hyperdreambooth.ui.records import BASE, Drawing, Person, read, told_apart, write
from hyperdreambooth.ui.studio import Studio


@pytest.fixture
def studio(maker: Maker, micro_photos: Path, tmp_path: Path):
    with opened(tmp_path / "out", maker) as studio:
        for number, name in enumerate(("Ana", "Ben")):
            add(studio, micro_photos / f"person-{number}" / "0.png", tmp_path, name)
        assert studio.idle(timeout=240)
        yield studio


def drawn(studio: Studio, drawing: Drawing) -> tuple[Drawing, Path]:
    folder = studio.drawing_folder(studio.draw(drawing))
    assert studio.idle(timeout=240)
    return read(folder, Drawing), folder


def test_a_mix_beside_the_base_is_what_generate_draws(studio: Studio) -> None:
    weights = {"ana": 0.25, "ben": 0.75}
    asked = request([*weights], [*weights.values()], "a [V] face\n\na photo of a [V] face", "3, 4", BASE)
    made, folder = drawn(studio, asked)
    assert made.state == "done" and made.labels == ("Ana × 0.25 + Ben × 0.75", BASE)
    base = studio.maker.base
    ana, ben = (
        load_adapter(studio.person_folder(key) / "person.safetensors", base) for key in ("ana", "ben")
    )
    for row, adapter in enumerate((0.25 * ana + 0.75 * ben, None)):
        prompts, seeds = zip(*made.columns, strict=True)
        wanted = generate_images(base, prompts, adapter, seed=seeds, guidance=1.0, batch=4)
        for number, picture in enumerate(wanted):
            with Image.open(folder / f"{row}-{number:02d}.png") as image:
                assert np.abs(np.asarray(image, int) - np.asarray(picture, int)).max() <= 2


def test_two_people_on_the_same_seeds(studio: Studio) -> None:
    made, folder = drawn(studio, request(["ana"], [1, 1], "a [V] face", "0", "ben"))
    assert made.labels == ("Ana", "Ben") and len(list(folder.glob("*.png"))) == 2


def test_people_of_one_name_are_told_apart(studio: Studio) -> None:
    folder = studio.person_folder("ben")
    write(folder, read(folder, Person).model_copy(update={"name": "Ana"}))
    made, _ = drawn(studio, request(["ana"], [1], "a [V] face", "0", "ben"))
    assert made.labels == ("Ana (ana)", "Ana (ben)")
    assert told_apart({"a": "Ana", "b": "Ben", "c": "Ana"}) == {"a": "Ana (a)", "b": "Ben", "c": "Ana (c)"}


def test_what_cannot_be_drawn_is_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match="at most 64"):
        studio.draw(request(["ana"], [1], "a [V] face", " ".join(map(str, range(65))), ""))
    with pytest.raises(InputError, match="not here"):
        studio.draw(request(["gone"], [1], "a [V] face", "0", ""))
    with pytest.raises(InputError, match="prompts"):
        request(["ana"], [1], " \n ", "0", "")


def test_a_person_takes_the_drawings_along(studio: Studio) -> None:
    _, folder = drawn(studio, request(["ana"], [1], "a [V] face", "0", "ben"))
    _, other = drawn(studio, request([], [], "a face", "0", ""))
    studio.delete("ben")
    assert not folder.exists() and other.exists()


def test_seeds() -> None:
    assert seeds_of("0, 1  5;5") == (0, 1, 5)
    for wrong in ("", "a", "-1", "1.5", "9" * 30):
        with pytest.raises(InputError, match="seeds"):
            seeds_of(wrong)
