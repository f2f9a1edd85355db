"""Likeness is scored against the same photos in all rows, and again when a scorer or a photo changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import micro
from hyperdreambooth.evaluate.config import Method
from hyperdreambooth.evaluate.judge import Judge
from hyperdreambooth.evaluate.methods import Makers
from hyperdreambooth.evaluate.page import write_sheets
from hyperdreambooth.evaluate.report import summary
from hyperdreambooth.evaluate.statistics import interval
from hyperdreambooth.files import InputError
from trial import cells, made, scores


def test_a_row_of_several_photos_leaves_fewer_to_score_all_rows_against(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    rows = ("another-photo", "prediction", "prediction:photos=2")
    experiment = made(home, micro_photos, tmp_path, rows=rows)
    make = Makers.make

    def watched(self: Makers, method: Method, people: Any) -> Any:
        seen.extend(len(photos) for photos in people)
        return make(self, method, people)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Makers, "make", watched)
        done = experiment.run()
    assert seen == [1, 1, 1, 2, 2, 2]
    assert [path.name for path in experiment.others("person-0")] == ["2.png"]
    assert done["another-photo"].cells["person-0"] == []  # no photo is left for the bound
    assert not set(cells(experiment, rows[1])["person-0"]) & set(cells(experiment, rows[2])["person-0"])
    files = write_sheets(experiment, {name: done[name] for name in rows}, tmp_path)
    assert files == ["sheets/prediction.jpg", "sheets/prediction-photos-2.jpg"]
    with pytest.raises(InputError, match=r"expected 4 photos a person .*, person-0 has fewer"):
        made(home, micro_photos, tmp_path, rows=("prediction:photos=4",))


def test_likeness_is_never_scored_against_the_reference(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = made(home, micro_photos, tmp_path, rows=("another-photo", "somebody-else", "base"))
    names = [path.name for path in experiment.others("person-0")]
    assert names == ["1.png"]  # 0 is the reference, 2 the bound
    asked: list[int] = []
    real = experiment.scorers.base
    assert real is not None
    identity, likeness = real.identity, Judge.likeness

    def watched(judge: Judge, images: Any, reference: Any, others: Any) -> Any:
        asked.append(len(others))
        return likeness(judge, images, reference, others)

    monkeypatch.setattr(Judge, "likeness", watched)
    rows = experiment.run()
    assert set(asked) == {1}
    for person, row in rows["base"].scores.items():
        with Image.open(micro_photos / person / "1.png") as other:
            pictures = [Image.open(cell.file).convert("RGB") for cell in rows["base"].cells[person]]
            assert row["identity"] == pytest.approx(identity(pictures, [other.convert("RGB")]), abs=2e-5)
    told = summary(experiment, rows)
    values = [sum(v for v in row["identity"] if v is not None) / 2 for row in rows["base"].scores.values()]
    assert told["rows"]["base"]["scores"]["identity"] == interval(values)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("identity", "calibration", {"same": 0.5, "stranger": 0.1}),
        ("attributes", "phrases", {**micro.PHRASES, "hat:red": "nothing"}),
        ("attributes", "id2label", dict(enumerate([*micro.LABELS[1::-1], *micro.LABELS[2:]]))),
    ],
)
def test_a_scorer_of_other_words_or_calibration_scores_again(
    home: Path, micro_photos: Path, tmp_path: Path, part: str, field: str, value: Any
) -> None:
    other = shutil.copytree(home, tmp_path / "home")
    how: dict[str, Any] = {"network": None, "rows": ("base",), "identities": 2}
    one = made(other, micro_photos, tmp_path / "out", **how)
    scores(one, one.run())
    file = other / "base" / "scorers" / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    again = made(other, micro_photos, tmp_path / "out", **how)
    fresh = made(other, micro_photos, tmp_path / "fresh", **how)
    assert scores(again, again.run()) == scores(fresh, fresh.run())
    assert again.scorers.names != one.scorers.names


def test_a_stale_score_is_made_again(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    first = made(home, photos, tmp_path / "out", rows=("base",)).run()["base"]
    Image.new("RGB", (32, 32), "red").save(photos / "person-1" / "1.png")
    second = made(home, photos, tmp_path / "out", rows=("base",)).run()["base"]
    assert first.cells == second.cells
    assert first.scores["person-0"] == second.scores["person-0"]
    assert first.scores["person-1"]["identity"] != second.scores["person-1"]["identity"]


def test_who_has_one_photo_only_is_named_and_not_scored(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    for number in (1, 2):
        (photos / "person-1" / f"{number}.png").unlink()
        (photos / "person-1" / f"{number}.txt").unlink()
    experiment = made(home, photos, tmp_path / "out", rows=("another-photo", "base"))
    told = summary(experiment, experiment.run())
    assert told["missing"] == ["likeness: null for person-1, who have one photo only"]
    assert {name: row["scores"]["identity"]["n"] for name, row in told["rows"].items()} == {
        "another-photo": 2,
        "base": 2,
    }
