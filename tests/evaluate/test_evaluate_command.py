"""`hdb evaluate`: a report to read and to look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from commands import error
from hyperdreambooth.apps.cli import app
from hyperdreambooth.evaluate import plots
from hyperdreambooth.evaluate.page import CELL, write_page
from hyperdreambooth.evaluate.report import summary
from hyperdreambooth.faces.dataset import read_faces
from trial import made


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
        assert sheet.height > 2 * CELL and sheet.width > 2 * CELL


# for the 16 tokens of the micro base
@pytest.mark.filterwarnings("ignore:.*after the end of what is read")
def test_a_newcomer_scores_an_adapter_of_their_own(home: Path, micro_photos: Path, tmp_path: Path) -> None:
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
    (micro_photos / "person-2" / ".thumbnails").mkdir(exist_ok=True)
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
    (tmp_path / "front.svg").write_text("of an earlier run")
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
    (tmp_path / "me.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # whole, without tensors
    brought = hdb("evaluate", *words, "--adapter", tmp_path / "me.safetensors", code=2)
    assert "PHOTOS" in brought and brought.count("\n") == 1


def test_an_out_among_the_photos_is_refused(micro_photos: Path) -> None:
    for out in (micro_photos, micro_photos / "result"):
        assert "would be read as photos" in error("evaluate", micro_photos, "--out", out)
    assert not (micro_photos / "result").exists()
