"""A cell is named by everything that it depends on, and by nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import micro
from hyperdreambooth.base.load import load_base
from hyperdreambooth.evaluate import protocol
from hyperdreambooth.evaluate.config import EvaluateConfig
from hyperdreambooth.evaluate.methods import Makers
from hyperdreambooth.evaluate.protocol import Protocol
from hyperdreambooth.evaluate.report import summary
from hyperdreambooth.evaluate.scorers import load_scorers
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.hypernet.predictor import load_hypernet
from trial import QUICK, SHORT, cells, made, renamed


def test_a_changed_input_makes_new_cells(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    rows = ("another-photo", "base", "prediction", "hyperdreambooth", "hyperdreambooth@2")
    first = made(home, micro_photos, tmp_path, rows=rows)
    old = {name: cells(first, name) for name in rows}
    assert old["hyperdreambooth"] == old["hyperdreambooth@2"]  # the same settings by another name

    def changed(**how: Any) -> dict[str, set[str]]:
        """Row → people with other cells."""
        now = made(how.pop("home", home), how.pop("photos", micro_photos), tmp_path, rows=rows, **how)
        return {name: {p for p, some in cells(now, name).items() if some != old[name][p]} for name in rows}

    everybody, nobody = set(first.people), set[str]()
    tuned = {name: nobody for name in rows[:3]} | {name: everybody for name in rows[3:]}
    assert changed() == {name: nobody for name in rows}
    assert changed(methods={"hyperdreambooth": {**SHORT["hyperdreambooth"], "lr": 0.5}}) == tuned
    assert changed(draw_steps=2)["base"] == everybody and changed(draw_steps=2)["another-photo"] == nobody
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    Image.new("RGB", (32, 32), "red").save(photos / "person-1" / "0.png")
    assert changed(photos=photos) == {name: nobody for name in rows[:2]} | {n: {"person-1"} for n in rows[2:]}
    other = shutil.copytree(home, tmp_path / "home")
    network = load_hypernet(other / "made")
    network.network.head.data.mul_(2)
    network.save(other / "made")
    assert changed(home=other) == {name: nobody for name in rows[:2]} | {n: everybody for n in rows[2:]}
    base = load_base(home / "base", device="cpu")
    base.pipe.vae.decoder.conv_out.weight.data.mul_(1.5)
    base.pipe.vae.save_pretrained(other / "base" / "vae")
    assert changed(home=other) == {name: everybody for name in rows}


LANDMARKS = [[12, 14], [20, 14], [16, 19], [13, 23], [19, 23]]


def test_landmarks_are_an_input_as_well(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    before = cells(made(home, photos, tmp_path), "hyperdreambooth")
    note = {"file_name": "0.png", "landmarks": LANDMARKS}
    (photos / "person-1" / "metadata.jsonl").write_text(json.dumps(note))
    after = cells(made(home, photos, tmp_path), "hyperdreambooth")
    assert {person for person in before if before[person] != after[person]} == {"person-1"}


@pytest.mark.parametrize(
    "loading",
    [
        {"trigger": "hat"},
        {"class_word": "hat"},
        {"resolution": 64},
        {"skip_sites": "^text_encoder"},
        {"dtype": "float16"},
    ],
)
def test_a_base_loaded_otherwise_makes_new_cells(
    home: Path, micro_photos: Path, tmp_path: Path, loading: dict[str, Any]
) -> None:
    rows = ("base", "dreambooth-lora")
    one = made(home, micro_photos, tmp_path, None, rows=rows)
    other = made(home, micro_photos, tmp_path, None, loading, rows=rows)
    for name in rows:
        before, after = cells(one, name), cells(other, name)
        assert not any(before[person] & after[person] for person in before)


def test_a_component_left_out_makes_new_cells(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    one = made(home, micro_photos, tmp_path, None, rows=("base",))
    base = load_base(home / "base", device="cpu")
    base.pipe.feature_extractor = micro.tokenizer()  # of the optional ones, whichever
    other = Protocol(Makers(base, None, None, None), one.scorers, one.everybody, one.config, tmp_path)
    assert not set.union(*cells(one, "base").values()) & set.union(*cells(other, "base").values())


def test_only_what_a_scheduler_does_names_cells(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    def names(**changed: Any) -> dict[str, set[str]]:
        folder = tmp_path / "-".join(["base", *changed])
        shutil.copytree(home / "base", folder)
        file = folder / "scheduler" / "scheduler_config.json"
        config = {**json.loads(file.read_text()), **changed}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        base = load_base(folder, device="cpu")
        return cells(
            Protocol(Makers(base, None, None, None), one.scorers, one.everybody, one.config, tmp_path), "base"
        )

    one = made(home, micro_photos, tmp_path, None, rows=("base",))
    assert names(clip_sample_range=None) == cells(one, "base")  # a default, left out
    assert names(timestep_spacing="trailing") != cells(one, "base")


def test_another_strength_makes_new_cells_and_is_reported(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    rows = ("base", "prediction", "hyperdreambooth")
    one = made(home, micro_photos, tmp_path, rows=rows)
    bold = str(renamed(home, tmp_path / "bold", strength=3.0))
    other = made(home, micro_photos, tmp_path, bold, rows=rows)
    assert [cells(one, name) == cells(other, name) for name in rows] == [True, False, False]
    network = other.makers.network
    assert network is not None
    assert summary(other, {})["network"] == {"fingerprint": network.fingerprint, "strength": 3.0}
    assert summary(made(home, micro_photos, tmp_path, None, rows=("base",)), {})["network"] is None


def test_everybody_is_called_alike_whatever_the_order_of_rows(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    own = load_hypernet(renamed(home, tmp_path / "own", trigger="hat", class_word="photo"))
    second = load_hypernet(renamed(home, tmp_path / "second", trigger="smiling", class_word="wearing"))
    rows = ("no-hypernetwork", "second", "dreambooth-lora", "prediction")

    def run(*order: str) -> dict[str, list[bytes]]:
        base = load_base(home / "base", device="cpu")
        config = EvaluateConfig(**{**QUICK, "rows": order, "identities": 1})
        experiment = Protocol(
            Makers(base, own, second, None),
            load_scorers(base, None, None, None),
            read_faces(micro_photos),
            config,
            tmp_path / "-".join(order),
        )
        assert experiment.prompts[1] == "a [V] photo in a red hat"
        done = experiment.run()
        assert (experiment.base.trigger, experiment.base.class_word) == ("hat", "photo")
        return {name: [cell.file.read_bytes() for cell in done[name].cells["person-0"]] for name in order}

    assert run(*rows) == run(*reversed(rows))


def test_rows_of_a_second_hypernetwork_use_its_words(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    own = load_hypernet(home / "made")
    second = load_hypernet(renamed(home, tmp_path / "second", trigger="smiling", class_word="photo"))
    twice = ("prediction", "second", "hyperdreambooth:network=second", "no-hypernetwork:network=second")
    base, config = load_base(home / "base", device="cpu"), EvaluateConfig(**{**QUICK, "identities": 1})
    both = Protocol(
        Makers(base, own, second, None),
        load_scorers(base, None, None, None),
        read_faces(micro_photos),
        config.model_copy(update={"rows": twice}),
        tmp_path / "both",
    )
    once = ("prediction", "hyperdreambooth", "no-hypernetwork")
    alone = made(home, micro_photos, tmp_path / "alone", str(tmp_path / "second"), rows=once, identities=1)
    for there, here in zip(twice[1:], once, strict=True):
        assert {cell.prompt for cell in both.cells(there, "person-0")} == set(alone.prompts)
        assert cells(both, there) == cells(alone, here)
        pictures = [row.cells["person-0"] for row in (both.row(there), alone.row(here))]
        ours, theirs = ([cell.file.read_bytes() for cell in some] for some in pictures)
        assert ours == theirs
    assert both.prompts != alone.prompts


def test_another_training_makes_new_cells_of_trained_rows_only(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("another-photo", "base", "prediction", "hyperdreambooth", "dreambooth-lora", "lidb")
    before = made(home, micro_photos, tmp_path, rows=rows)
    old = {name: cells(before, name) for name in rows}
    monkeypatch.setattr(protocol, "TRAINING", protocol.TRAINING + 1)
    assert [cells(before, name) == old[name] for name in rows] == [True] * 3 + [False] * 3


def test_a_hypernetwork_is_itself_in_either_place(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    rows = ("prediction", "hyperdreambooth", "second", "hyperdreambooth:network=second")
    bold = renamed(home, tmp_path / "bold", strength=3.0)
    first = made(home, micro_photos, tmp_path, rows=rows[:2])
    base, own = load_base(home / "base", device="cpu"), load_hypernet(bold)
    makers = Makers(base, own, load_hypernet(home / "made"), None)
    both = Protocol(
        makers, first.scorers, first.people, first.config.model_copy(update={"rows": rows}), tmp_path
    )
    for name, again in zip(rows[:2], rows[2:], strict=True):
        assert cells(both, again) == cells(first, name) != cells(both, name)
