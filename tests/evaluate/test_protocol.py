"""The experiment on the micro base: every row, people side by side, resumed and grown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperdreambooth.evaluate import methods, protocol
from hyperdreambooth.evaluate.config import METHODS, Method
from hyperdreambooth.evaluate.methods import Makers
from hyperdreambooth.evaluate.page import write_page, write_sheets
from hyperdreambooth.evaluate.protocol import draw_people
from hyperdreambooth.evaluate.report import markdown, summary
from hyperdreambooth.finetune.word import Word
from trial import PROMPTS, SHORT, made, scores, written


def test_every_row_of_the_paper(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "shared"))
    rows = tuple(name for name in METHODS if name not in ("adapter", "second") and "agg" not in name)
    experiment = made(home, micro_photos, tmp_path, rows=rows, identities=2)
    done = experiment.run()
    told = summary(experiment, done)
    assert list(told["rows"]) == list(rows) and told["missing"] == []
    for name, row in told["rows"].items():
        bound = METHODS[name].kind in ("photo", "stranger")
        assert row["scores"]["identity"]["n"] == 2
        assert row["scores"]["dino"] is None and row["scores"]["clip_t"] is None
        assert (row["scores"]["prompt"] is None) == bound and (row["cost"] == {}) == bound
        pictures = [len(cells) for cells in done[name].cells.values()]
        assert pictures == [1, 1] if bound else [2, 2]
    assert {"prompt:hat", "prompt:mood"} <= told["rows"]["base"]["scores"].keys()
    assert told["rows"]["lidb"]["cost"]["bytes"] < told["rows"]["dreambooth-lora"]["cost"]["bytes"]
    weights = sum(p.nbytes for m in experiment.base.components.values() for p in m.parameters())
    assert told["rows"]["dreambooth"]["cost"]["bytes"] == weights
    assert told["rows"]["textual-inversion"]["cost"]["bytes"] == 16 * 4
    assert [row["cost"].get("steps", 0) for row in told["rows"].values()][-5:] == [1, 2, 2, 2, 2]
    assert told["paired"]["against"] == "hyperdreambooth" and "hyperdreambooth" not in told["paired"]["rows"]
    assert len(list((tmp_path / "shared" / "class").rglob("*.png"))) == 2  # drawn once for all
    text = markdown(told)
    assert all(f"| {name} |" in text for name in rows)


@pytest.mark.parametrize("name", ["base", "prediction", "textual-inversion"])
def test_people_drawn_together_are_each_as_alone(
    home: Path, micro_photos: Path, tmp_path: Path, name: str
) -> None:
    experiment = made(home, micro_photos, tmp_path, rows=(name,))
    cells = [cell for person in experiment.people for cell in experiment.cells(name, person)]
    photos = [experiment.people[person][:1] for person in experiment.people]
    people, _ = experiment.makers.make(experiment.methods[name], photos)
    each = [one for one in people for _ in PROMPTS]
    together = draw_people(experiment.base, each, cells, experiment.config)
    for person, cell, picture in zip(each, cells, together, strict=True):
        (alone,) = draw_people(experiment.base, [person], [cell], experiment.config)
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 1
    assert len({picture.tobytes() for picture in together}) == len(cells)


def test_a_resumed_run_is_an_uninterrupted_one(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("another-photo", "base", "hyperdreambooth", "textual-inversion")
    whole = made(home, micro_photos, tmp_path / "whole", rows=rows)
    expected = scores(whole, whole.run())
    real, calls = protocol.draw_people, [0]

    def killed(*args: Any) -> list[Image.Image]:
        calls[0] += 1
        if calls[0] in (1, 4, 6):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(protocol, "draw_people", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            made(home, micro_photos, tmp_path / "killed", rows=rows).run()
    resumed = made(home, micro_photos, tmp_path / "killed", rows=rows)
    assert scores(resumed, resumed.run()) == expected
    before = written(tmp_path / "killed")
    again = made(home, micro_photos, tmp_path / "killed", rows=rows)
    monkeypatch.setattr(protocol, "draw_people", None)
    assert scores(again, again.run()) == expected and written(tmp_path / "killed") == before


def test_a_run_grows_and_keeps_what_is_there(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    rows = ("base", "hyperdreambooth")
    made(home, micro_photos, tmp_path, rows=rows, identities=2).run()
    before = written(tmp_path)
    more = (*PROMPTS, "a photo of a [V] face")
    grown = made(home, micro_photos, tmp_path, rows=(*rows, "prediction"), prompts=more, seeds=(0, 1))
    done = grown.run()
    after = written(tmp_path)
    assert all(after[path] == content for path, content in before.items())
    assert all(len(cells) == 6 for row in done.values() for cells in row.cells.values())
    assert len(list((tmp_path / "made").rglob("*.safetensors"))) == 9
    fresh = made(home, micro_photos, tmp_path / "fresh", rows=("base",), prompts=more, seeds=(0, 1))
    assert scores(fresh, fresh.run()).split('"paired"')[0] == scores(fresh, {"base": done["base"]})


def test_a_diverged_person_is_null_and_stops_nobody(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    rows = ("dreambooth-lora", "textual-inversion", "dreambooth", "base")
    wild: dict[str, Any] = {"steps": 3, "lr": 1e30}
    changed = {**SHORT, "dreambooth-lora": {**wild, "rank": 1}, "dreambooth": {**wild, "prior_weight": 0}}
    for _ in range(2):  # and again
        experiment = made(home, micro_photos, tmp_path, rows=rows, methods=changed, identities=2)
        done = experiment.run()
        told = summary(experiment, done)
        for row in ("dreambooth-lora", "dreambooth"):
            assert told["rows"][row]["scores"]["identity"] is None and told["rows"][row]["cost"] == {}
        for row in ("textual-inversion", "base"):
            assert told["rows"][row]["scores"]["identity"]["n"] == 2
        assert told["missing"] == [
            f"{row}: null for person-0, person-1: the training diverged; lower its lr"
            for row in ("dreambooth-lora", "dreambooth")
        ]
        assert len(list((tmp_path / "made").rglob("*.safetensors"))) == 4  # of the other two rows
        write_page(experiment, done, told, tmp_path)
        write_sheets(experiment, done, tmp_path)


def test_whom_a_scaler_has_kept_finite_is_not_taken_for_trained(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    """In float16 a step without finite gradients is skipped, so the numbers stay as they began."""
    half = {**SHORT, "dreambooth-lora": {**SHORT["dreambooth-lora"], "precision": "fp16"}}
    experiment = made(home, micro_photos, tmp_path, rows=("dreambooth-lora",), methods=half)
    torch.nn.init.constant_(experiment.base.denoiser.conv_in.weight, torch.inf)
    assert experiment.run()["dreambooth-lora"].diverged == ("person-0", "person-1", "person-2")


def test_of_people_side_by_side_only_the_diverged_one_is_null(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Makers.make

    def poisoned(self: Makers, method: Method, people: Any) -> Any:
        persons, costs = make(self, method, people)
        next(iter(persons[1].factors.values()))[0][0, 0, 0] = float("nan")  # type: ignore[union-attr]
        return persons, costs

    monkeypatch.setattr(Makers, "make", poisoned)
    experiment = made(home, micro_photos, tmp_path, rows=("dreambooth-lora",))
    done = experiment.run()
    assert done["dreambooth-lora"].diverged == ("person-1",)
    assert summary(experiment, done)["rows"]["dreambooth-lora"]["scores"]["identity"]["n"] == 2


def test_everybody_costs_their_own_steps(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(makers: Makers, method: Method, people: Any) -> list[Word]:
        return [Word(torch.zeros(16), {"steps": str(10 + k)}) for k in range(len(people))]

    monkeypatch.setitem(methods._KINDS, "scratch", stopped)  # type: ignore[arg-type]
    experiment = made(home, micro_photos, tmp_path, rows=("textual-inversion",))
    done = experiment.run()["textual-inversion"]
    assert [cost.steps for cost in done.costs.values()] == [10, 11, 12]
    assert (
        summary(experiment, {"textual-inversion": done})["rows"]["textual-inversion"]["cost"]["steps"] == 11
    )
