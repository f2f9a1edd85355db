"""The experiment on the micro base: resumes, grows, and never mistakes an old cell for a new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import micro
from hyperdreambooth.apps.cli import app
from hyperdreambooth.base.load import load_base
from hyperdreambooth.config import load_config
from hyperdreambooth.evaluate import methods, plots, protocol
from hyperdreambooth.evaluate.config import METHODS, EvaluateConfig, Method, method_of
from hyperdreambooth.evaluate.judges import load_judges
from hyperdreambooth.evaluate.methods import Makers
from hyperdreambooth.evaluate.page import write_page
from hyperdreambooth.evaluate.protocol import Protocol, Row, draw_people
from hyperdreambooth.evaluate.report import markdown, summary
from hyperdreambooth.evaluate.sheet import CELL, write_sheets
from hyperdreambooth.evaluate.statistics import interval
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.finetune.word import Word
from hyperdreambooth.hypernet.predictor import load_hypernet
from hyperdreambooth.runs import InputError

PROMPTS = ("a photo of a [V] {class_word}, smiling", "a [V] {class_word} in a red hat")
SHORT: dict[str, dict[str, Any]] = {
    "hyperdreambooth": {"steps": 2, "rank": 2, "batch": 1},
    "no-hypernetwork": {"steps": 2, "rank": 2, "batch": 1},
    "no-refinement": {"steps": 1, "rank": 2, "batch": 1},
    "dreambooth": {"steps": 2, "batch": 1, "lr": 1e-3, "prior_images": 2},
    "dreambooth-lora": {"steps": 2, "rank": 1},
    "lidb": {"steps": 2, "down_dim": 4, "up_dim": 3},
    "textual-inversion": {"steps": 2},
}
QUICK: dict[str, Any] = {"prompts": PROMPTS, "draw_steps": 1, "identities": 3, "batch": 4, "methods": SHORT}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path) -> Path:
    """A micro base with judges, and a hypernetwork for it."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(micro_dir, folder / "base")
    micro.scorers(folder / "base" / "scorers")
    micro.hypernet(folder, load_base(folder / "base", device="cpu"))
    return folder


def made(
    home: Path, photos: Path, out: Path, network: str | None = "made", loading: Any = None, **fields: Any
) -> Protocol:
    """An experiment as the command makes it."""
    base = load_base(home / "base", device="cpu", **(loading or {}))
    makers = Makers(base, load_hypernet(home / network) if network else None, None, None)
    config = EvaluateConfig(**{**QUICK, **fields})
    return Protocol(makers, load_judges(base, None, None, None), read_faces(photos), config, out)


def scores(experiment: Protocol, rows: Mapping[str, Row]) -> str:
    """All scores of a report, as they are written."""
    told = summary(experiment, rows)
    figures = {name: row["scores"] for name, row in told["rows"].items()}
    return json.dumps([figures, told["paired"], told["people"]])


def written(out: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_every_row_of_the_paper(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "shared"))
    rows = tuple(name for name in METHODS if name not in ("adapter", "pro") and "agg" not in name)
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


def test_a_row_of_several_photos_takes_them_from_the_judges_of_all_rows(
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
    with pytest.raises(InputError, match="takes 4 photos a person, person-0 has fewer"):
        made(home, micro_photos, tmp_path, rows=("prediction:photos=4",))


def test_likeness_is_never_judged_by_the_reference(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    experiment = made(home, micro_photos, tmp_path, rows=("another-photo", "somebody-else", "base"))
    names = [path.name for path in experiment.others("person-0")]
    assert names == ["1.png"]  # 0 is the reference, 2 the bound
    asked: list[int] = []
    real = experiment.judges.scorers
    assert real is not None
    identity = real.identity

    def watched(images: Any, others: Any) -> list[float]:
        asked.append(len(others))
        return identity(images, others)

    real.identity = watched  # type: ignore[method-assign]
    rows = experiment.run()
    assert set(asked) == {1}
    for person, row in rows["base"].scores.items():
        with Image.open(micro_photos / person / "1.png") as other:
            pictures = [Image.open(cell.file).convert("RGB") for cell in rows["base"].cells[person]]
            assert row["identity"] == pytest.approx(identity(pictures, [other.convert("RGB")]), abs=2e-5)
    told = summary(experiment, rows)
    values = [sum(v for v in row["identity"] if v is not None) / 2 for row in rows["base"].scores.values()]
    assert told["rows"]["base"]["scores"]["identity"] == interval(values)


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


def cells(experiment: Protocol, name: str) -> dict[str, set[str]]:
    return {p: {cell.file.stem for cell in experiment.cells(name, p)} for p in experiment.people}


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
    other = Protocol(Makers(base, None, None, None), one.judges, one.everybody, one.config, tmp_path)
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
            Protocol(Makers(base, None, None, None), one.judges, one.everybody, one.config, tmp_path), "base"
        )

    one = made(home, micro_photos, tmp_path, None, rows=("base",))
    assert names(clip_sample_range=None) == cells(one, "base")  # a default, left out
    assert names(timestep_spacing="trailing") != cells(one, "base")


def renamed(home: Path, folder: Path, **facts: Any) -> Path:
    """The hypernetwork of `home` with other words or another strength."""
    shutil.copytree(home / "made", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "facts": {**config["facts"], **facts}}))
    return folder


def test_another_strength_makes_new_cells_and_is_told(home: Path, micro_photos: Path, tmp_path: Path) -> None:
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
    pro = load_hypernet(renamed(home, tmp_path / "pro", trigger="smiling", class_word="wearing"))
    rows = ("no-hypernetwork", "pro", "dreambooth-lora", "prediction")

    def run(*order: str) -> dict[str, list[bytes]]:
        base = load_base(home / "base", device="cpu")
        config = EvaluateConfig(**{**QUICK, "rows": order, "identities": 1})
        experiment = Protocol(
            Makers(base, own, pro, None),
            load_judges(base, None, None, None),
            read_faces(micro_photos),
            config,
            tmp_path / "-".join(order),
        )
        assert experiment.prompts[1] == "a [V] photo in a red hat"
        done = experiment.run()
        assert (base.trigger, base.class_word) == ("hat", "photo")
        return {name: [cell.file.read_bytes() for cell in done[name].cells["person-0"]] for name in order}

    assert run(*rows) == run(*reversed(rows))


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
    assert summary(experiment, {"x": done})["rows"]["x"]["cost"]["steps"] == 11


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("identity", "calibration", {"same": 0.5, "stranger": 0.1}),
        ("attributes", "phrases", {**micro.PHRASES, "hat:red": "nothing"}),
        ("attributes", "id2label", dict(enumerate([*micro.LABELS[1::-1], *micro.LABELS[2:]]))),
    ],
)
def test_a_judge_of_other_words_or_calibration_judges_again(
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
    assert again.judges.names != one.judges.names


def test_a_stale_score_is_judged_again(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    first = made(home, photos, tmp_path / "out", rows=("base",)).run()["base"]
    Image.new("RGB", (32, 32), "red").save(photos / "person-1" / "1.png")
    second = made(home, photos, tmp_path / "out", rows=("base",)).run()["base"]
    assert first.cells == second.cells
    assert first.scores["person-0"] == second.scores["person-0"]
    assert first.scores["person-1"]["identity"] != second.scores["person-1"]["identity"]


def test_who_has_one_photo_only_is_named_and_not_judged(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    for number in (1, 2):
        (photos / "person-1" / f"{number}.png").unlink()
    experiment = made(home, photos, tmp_path / "out", rows=("another-photo", "base"))
    told = summary(experiment, experiment.run())
    assert told["missing"] == ["likeness: null for person-1, who have one photo only"]
    assert {name: row["scores"]["identity"]["n"] for name, row in told["rows"].items()} == {
        "another-photo": 2,
        "base": 2,
    }


def test_rows_are_named_or_refused() -> None:
    config = EvaluateConfig(rows=("hyperdreambooth@7",), methods={"hyperdreambooth": {"steps": 3, "lr": 1.0}})
    assert method_of("hyperdreambooth@7", config).settings == {"steps": 7, "lr": 1.0}
    assert config.compared() == "hyperdreambooth@7"
    rows = ("base", "hyperdreambooth@7", "no-hypernetwork", "hyperdreambooth")
    assert EvaluateConfig(rows=rows).compared() == "no-hypernetwork"
    assert EvaluateConfig(rows=rows, against="base").compared() == "base"
    several = method_of("hyperdreambooth:photos=3,way=side_by_side@9", config)
    assert several.photos == 3 and several.settings == {"steps": 9, "lr": 1.0, "way": "side_by_side"}
    assert method_of("hyperdreambooth:start=shared", config).start == "shared"
    for rows, words in (
        (("magic",), "'magic' is no method"),
        (("base@x",), "NAME@STEPS"),
        (("base:photos=0",), "photos: Input should be"),
        (("base:start=nowhere",), "start: Input should be"),
    ):
        with pytest.raises(InputError, match=words):
            protocol.methods_of(EvaluateConfig(rows=rows))
    with pytest.raises(InputError, match="'magic' is no method"):
        protocol.methods_of(EvaluateConfig(methods={"magic": {}}))
    with pytest.raises(InputError, match="against"):
        protocol.methods_of(EvaluateConfig(against="lidb"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": (0, 1, 0)}, "seeds: .*each once"),
        ({"prompts": ("a face", "a face")}, "prompts: .*each once"),
        ({"prompts": ("a face", " ")}, "prompts: .*empty"),
    ],
)
def test_repeated_seeds_and_empty_prompts_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_config(EvaluateConfig, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows": ("pro",)}, "pro: expected a second hypernetwork"),
        ({"rows": ("adapter",)}, "--adapter"),
        ({"rows": ("lidb",), "methods": {"lidb": {"stepz": 1}}}, "stepz"),
        ({"rows": ("base",), "methods": {"base": {"steps": 1}}}, "has no settings"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    home: Path, micro_photos: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        made(home, micro_photos, tmp_path, **fields).run()


def hdb(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr if code else result.stdout


def test_the_command_leaves_a_report_to_read_and_to_look_at(
    home: Path, micro_photos: Path, tmp_path: Path
) -> None:
    rows = '["another-photo", "base", "prediction", "hyperdreambooth@1", "hyperdreambooth"]'
    words = ["--set", f"rows={rows}", "--set", "methods.hyperdreambooth={steps=2, rank=2, batch=1}"]
    words += ["--set", "draw_steps=1", "--set", 'prompts=["a [V] face, smiling"]', "--identities", 2]
    on = ["--base", home / "base", "--hypernet", home / "made", "--device", "cpu"]
    said = hdb("evaluate", micro_photos, "--out", tmp_path / "out", *words, *on)
    assert "hyperdreambooth" in said and str(tmp_path / "out" / "report.html") in said
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"command", "config", "environment", "rows", "paired", "people", "seconds"} <= told.keys()
    assert all((tmp_path / "out" / name).is_file() for name in told["files"])
    assert {"table.md", "steps.png", "steps.svg", "front.png", "front.svg"} <= set(told["files"])
    with Image.open(tmp_path / "out" / "front.png") as plot:
        assert plot.width > 800
    assert plots.families(told)["hyperdreambooth"] == ["hyperdreambooth@1", "hyperdreambooth"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * (1 + 5) and page.count("data:image/svg+xml") == 2
    order = ("the photo</td>", "another-photo</td><td><img", "a [V] face, smiling</th>", "base</td><td><img")
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    assert "http://" not in page and "https://" not in page
    assert "sheets/hyperdreambooth.jpg" in told["files"] and "sheets/another-photo.jpg" not in told["files"]
    with Image.open(tmp_path / "out" / "sheets" / "base.jpg") as sheet:
        assert sheet.size == (2 * 2 * CELL + CELL // 4, CELL)  # two people a line: photo and one prompt each


def test_a_newcomer_judges_an_adapter_of_their_own(home: Path, micro_photos: Path, tmp_path: Path) -> None:
    on = ["--base", home / "base", "--device", "cpu"]
    network = ["--hypernet", home / "made"]
    photo = micro_photos / "person-2" / "0.png"
    hdb("predict", photo, "--out", tmp_path / "p.safetensors", "--format", "kohya", *on, *network)
    words = ["--adapter", tmp_path / "p.safetensors", "--set", "draw_steps=1"]
    said = hdb("evaluate", micro_photos, "--out", tmp_path / "out", "--identity", "person-2", *words, *on)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(told["rows"]) == ["another-photo", "somebody-else", "base", "adapter"] and "adapter" in said
    assert list(told["people"]["adapter"]["identity"]) == ["person-2"]
    assert told["rows"]["adapter"]["scores"]["identity"]["low"] is None
    whose = made(home, micro_photos, tmp_path, rows=("prediction",), prompts=told["config"]["prompts"])
    expected = whose.run()["prediction"].scores["person-2"]["identity"]
    ours = told["people"]["adapter"]["identity"]["person-2"]
    assert ours == pytest.approx(float(np.mean([v for v in expected if v is not None])), abs=2e-3)
    flat = hdb("evaluate", micro_photos / "person-2", "--out", tmp_path / "flat", *words, *on)
    assert "adapter" in flat
    assert "--identity" in hdb("evaluate", micro_photos, "--out", tmp_path / "no", *words, *on, code=2)
    wrong = hdb("evaluate", micro_photos, "--out", tmp_path / "no", "--identity", "x", *words, *on, code=2)
    assert "no such person" in wrong and wrong.count("\n") == 1


def test_without_matplotlib_there_is_a_note_and_no_plot(
    home: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    experiment = made(home, micro_photos, tmp_path, rows=("base",), identities=1)
    rows = experiment.run()
    told = summary(experiment, rows)
    assert plots.write_plots(told, tmp_path) == []
    write_page(experiment, rows, told, tmp_path)
    assert "data:image/svg" not in (tmp_path / "report.html").read_text()


def test_labels_of_steps_do_not_lie_on_one_another() -> None:
    assert plots.apart({0, 10, 40, 1000, 1200}) == [0, 10, 40, 1200]


def test_the_embedded_base_brings_people_of_its_own(home: Path, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "out", "--identities", 2, "--device", "cpu", "--set", 'rows=["base"]']
    words += ["--set", "draw_steps=1", "--set", 'prompts=["a [V] face"]', "--set", "seeds=[3]"]
    hdb("evaluate", *words)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    rendered = read_faces(tmp_path / "out" / "photos")
    assert list(rendered) == ["test-3000000", "test-3000001"]
    assert [len(photos) for photos in rendered.values()] == [8, 8]
    assert list(told["people"]["base"]["identity"]) == list(rendered)
    elsewhere = hdb("evaluate", *words, "--base", home / "base", code=2)
    assert "PHOTOS" in elsewhere and elsewhere.count("\n") == 1
    missing = hdb("evaluate", *words, "--adapter", tmp_path / "me.safetensors", code=2)
    assert missing == f"error: {tmp_path / 'me.safetensors'}: no such file\n"
    (tmp_path / "me.safetensors").touch()
    brought = hdb("evaluate", *words, "--adapter", tmp_path / "me.safetensors", code=2)
    assert "PHOTOS" in brought and brought.count("\n") == 1
