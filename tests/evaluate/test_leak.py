"""The leak: who is on pictures whose prompts name the class and not the person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hyperdreambooth.evaluate import protocol
from hyperdreambooth.evaluate.methods import Makers
from hyperdreambooth.evaluate.protocol import Cell
from hyperdreambooth.evaluate.report import paired_table, summary, table
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from trial import SHORT, cells, made, scores, written

MANY = tuple(f"a photo of a [V] {{class_word}}, {word}" for word in ("smiling", "sad", "old", "red", "wet"))


def test_one_prompt_in_four_is_drawn_without_the_word(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    rows = ("another-photo", "base", "hyperdreambooth", "textual-inversion")
    experiment = made(home, micro_photos, tmp_path, rows=rows, prompts=MANY, seeds=(0, 1))
    done = experiment.run()
    for name in rows[1:]:
        named, unnamed = experiment.cells(name, "person-1"), experiment.unnamed(name, "person-1")
        assert [cell.prompt for cell in unnamed] == [
            "a photo of a face, smiling",
            "a photo of a face, wet",
        ] * 2
        assert {cell.seed for cell in unnamed} == {cell.seed for cell in named}
        assert all(cell.file.is_file() for cell in unnamed) and done[name].cells["person-1"] == named
        assert len(done[name].scores["person-1"]["leak"]) == 4
    assert experiment.unnamed("another-photo", "person-1") == []
    assert "leak" not in done["another-photo"].scores["person-1"]


def test_the_leak_of_who_ignores_the_prompt_is_the_identity(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of who heeds the word is a stranger's."""

    def draw(base: Any, people: Any, some: Sequence[Cell], config: Any) -> list[Image.Image]:
        photos = {name: Image.open(micro_photos / name / "0.png").convert("RGB") for name in names}
        stranger = Image.new("RGB", (32, 32), "white")
        heeding = [row == "heeds" and "sks" not in base.prompt(str(cell.prompt)) for cell in some]
        return [stranger if heeds else photos[c.person] for heeds, c in zip(heeding, some, strict=True)]

    names = [f"person-{k}" for k in range(3)]
    monkeypatch.setattr(protocol, "draw_people", draw)
    found = {}
    for row in ("ignores", "heeds"):
        experiment = made(home, micro_photos, tmp_path / row, rows=("prediction",), prompts=MANY)
        found[row] = summary(experiment, experiment.run())
    ignored, heeded = (found[row]["people"]["prediction"] for row in ("ignores", "heeds"))
    assert ignored["leak"] == pytest.approx(ignored["identity"])
    assert heeded["identity"] == ignored["identity"]
    assert all(heeded["leak"][name] != pytest.approx(ignored["leak"][name]) for name in names)
    (head, line) = table(found["ignores"])
    assert head.index("leak") == head.index("identity") + 1
    assert line[head.index("leak")] == line[head.index("identity")] and "[" in line[head.index("leak")]


def test_a_report_from_before_makes_tables(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    experiment = made(home, micro_photos, tmp_path, rows=("base", "prediction", "hyperdreambooth"))
    told = summary(experiment, experiment.run())
    del told["rows"]["base"]["scores"]["leak"]
    head, first, *_ = table(told)
    assert first[head.index("leak")] == "–" and first[head.index("identity")] != "–"
    for row in told["rows"].values():
        row["scores"].pop("leak", None)
    assert "leak" not in table(told)[0] and "leak" not in paired_table(told)[0]


def test_an_experiment_from_before_draws_what_lacks_and_trains_nobody(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("base", "hyperdreambooth", "lidb")
    first = made(home, micro_photos, tmp_path, rows=rows)
    expected = scores(first, first.run())
    everything = written(tmp_path)
    for name in rows:
        for person in first.people:
            for cell in first.unnamed(name, person):
                cell.file.unlink()
    monkeypatch.setattr(Makers, "make", lambda *_: pytest.fail("somebody was trained again"))
    again = made(home, micro_photos, tmp_path, rows=rows)
    assert scores(again, again.run()) == expected
    after = written(tmp_path)
    assert after.keys() == everything.keys()
    assert all(after[path][0] == content for path, (content, _) in everything.items())


def test_a_weight_makes_new_people_and_none_is_as_before(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("base", "prediction", "hyperdreambooth", "hyperdreambooth:class_weight=2.0")
    plain = made(home, micro_photos, tmp_path, rows=rows)
    four = [cells(plain, name) for name in rows]
    assert not any(four[2][person] & four[3][person] for person in plain.people)
    off = {**SHORT, "hyperdreambooth": {**SHORT["hyperdreambooth"], "class_weight": 0.0}}
    assert [cells(made(home, micro_photos, tmp_path, rows=rows, methods=off), n) for n in rows] == four
    for config in (FinetuneConfig(), DreamboothConfig(method="lora")):
        dumped = config.model_dump(mode="json")
        assert protocol._named(config) == {key: dumped[key] for key in dumped if key != "class_weight"}
        held = config.model_copy(update={"class_weight": 2.0})
        assert protocol._named(held) == {**dumped, "class_weight": 2.0}


def test_people_with_leaks_are_each_as_alone(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    """Trained with the term, side by side and one by one: the same pictures."""
    rows = ("hyperdreambooth:class_weight=2.0",)
    names = []
    for together in (3, 1):
        experiment = made(home, micro_photos, tmp_path / str(together), rows=rows, together=together)
        done = experiment.run()[rows[0]]
        names.append(experiment.cells(rows[0], "person-2"))
        assert all(score is not None for score in done.scores["person-2"]["leak"])
    assert [cell.file.stem for cell in names[0]] == [cell.file.stem for cell in names[1]]
