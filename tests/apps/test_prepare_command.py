"""`hdb prepare` on a real photograph, and what it makes read by a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import skimage.data
from PIL import Image, ImageFilter
from typer.testing import CliRunner, Result

from hyperdreambooth.apps.cli import app
from hyperdreambooth.faces.dataset import SHEET, read_faces

LANDMARKS = [[203.9, 100.8], [246.7, 102.9], [224.8, 125.8], [203.9, 140.5], [244.7, 141.1]]


def hdb(*words: object, code: int = 0) -> Result:
    """Runs a command and insists on its exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The astronaut, sharp and blurred, and a torn file; the landmarks measured by hand."""
    home, image = tmp_path / "photos" / "ana", Image.fromarray(skimage.data.astronaut())
    home.mkdir(parents=True)
    image.save(home / "1.jpg", quality=95)
    image.filter(ImageFilter.GaussianBlur(6)).save(home / "2.png")
    (home / "3.jpg").write_bytes((home / "1.jpg").read_bytes()[:9000])
    lines = [{"file_name": name, "landmarks": LANDMARKS} for name in ("1.jpg", "2.png", "3.jpg")]
    lines[0]["text"] = "a photo of a [V] {class_word}, smiling"
    (home / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "photos"


def test_a_real_photograph_becomes_an_aligned_crop(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "crops"
    result = hdb("prepare", photos, "--out", out, "--size", 256, "--workers", 1)
    assert f"{out}: 1 crop of 1 person, 2 dropped" in result.stdout and "2.png: blurred" in result.stdout
    entries = report(out)
    assert entries["counts"] == {"photos": 3, "kept": 1, "dropped": 2, "people": 1}
    assert entries["kept"] == [{"photo": str(photos / "ana" / "1.jpg"), "crop": "ana/1.png"}]
    assert [one["reason"].split()[0] for one in entries["dropped"]] == ["blurred:", "the"]
    assert (
        entries["config"]["size"] == 256
        and "prepare" in entries["seconds"]
        and "torch" in entries["environment"]
    )
    ((name, (photo,)),) = read_faces(out).items()
    assert name == "ana" and photo.caption == "a photo of a [V] {class_word}, smiling"
    assert photo.landmarks is not None and abs(photo.landmarks[0][1] - photo.landmarks[1][1]) < 2
    with Image.open(out / SHEET) as sheet, Image.open(photo.path) as crop:
        assert sheet.width > 400 and sheet.height > 300 and crop.size == (256, 256)


def test_findings_are_in_the_report_and_on_the_sheet(photos: Path, tmp_path: Path) -> None:
    """A copy in another person's folder; the encoder is switched off, and the report says so."""
    home, out = photos / "ana", tmp_path / "crops"
    (home / "2.png").unlink()
    (home / "3.jpg").unlink()
    shift = [[x - 20, y] for x, y in LANDMARKS]
    Image.open(home / "1.jpg").crop((20, 0, 512, 400)).save(home / "4.png")
    (photos / "bob").mkdir()
    Image.open(home / "1.jpg").resize((400, 400)).save(photos / "bob" / "1.jpg", quality=50)
    scaled = [[x * 400 / 512, y * 400 / 512] for x, y in LANDMARKS]
    for folder, names in ((home, {"1.jpg": LANDMARKS, "4.png": shift}), (photos / "bob", {"1.jpg": scaled})):
        lines = [json.dumps({"file_name": name, "landmarks": points}) for name, points in names.items()]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    result = hdb("prepare", photos, "--out", out, "--size", 128, "--workers", 1, "--set", "check=off")
    assert "check      ana/1, bob/1: the same photo" in result.stdout
    found = report(out)["check"]
    assert found["duplicates"] == [["ana/1", "bob/1"]] and found["references"].keys() == {"ana"}
    assert found["encoder"] is None and found["not_checked"] == "switched off" and found["strangers"] == []
    assert f"{out}: 3 crops of 2 people, 0 dropped" in result.stdout


@pytest.mark.filterwarnings("ignore:.*after the end of what is read")  # 16 tokens
def test_already_cropped_photos_are_read_by_a_training(photos: Path, tmp_path: Path, micro_dir: Path) -> None:
    out = tmp_path / "crops"
    hdb("prepare", photos, "--out", out, "--already-cropped", "--size", 64, "--set", "sharpness=0")
    assert report(out)["counts"] == {"photos": 3, "kept": 2, "dropped": 1, "people": 1}
    image = Image.fromarray(skimage.data.astronaut()).filter(ImageFilter.GaussianBlur(6))
    with Image.open(out / "ana" / "2.png") as crop:
        assert crop.tobytes() == image.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    words = ["--base", micro_dir, "--device", "cpu", "--steps", 1, "--set", "down_dim=4", "--set", "up_dim=3"]
    hdb("preoptimize", out, "--out", tmp_path / "bank", *words)
    assert report(tmp_path / "bank")["identities"] == 1
    words += ["--set", "background=0.1", "--set", "batch=1"]
    hdb("dreambooth", out / "ana", "--out", tmp_path / "run", *words)


def test_settings_come_from_files_words_and_flags(tmp_path: Path) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text('base = "somewhere"\n[prepare]\nsize = 768\nmargin = 0.5\n[train]\nsteps = 3\n')
    words = [
        "prepare",
        "none",
        "--out",
        tmp_path / "x",
        "--config",
        config,
        "--set",
        "margin=0.25",
        "--dry-run",
    ]
    shown = hdb(*words).stdout
    assert "size: 768" in shown and "margin: 0.25" in shown and not (tmp_path / "x").exists()


def test_mistakes_are_one_line(photos: Path, tmp_path: Path) -> None:
    empty, out = tmp_path / "empty", ["--out", tmp_path / "crops"]
    empty.mkdir()
    (photos / "ana" / "metadata.jsonl").unlink()
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "1.jpg").write_bytes(b"no picture")
    for words, line in (
        ([photos, *out], "pass --detector FILE, or --already-cropped"),
        ([photos, "--out", tmp_path / "d", "--detector", tmp_path / "none.onnx"], "none.onnx: no such file"),
        ([tmp_path / "nothing", "--out", tmp_path / "e"], "no such photo"),
        ([empty, "--out", tmp_path / "f"], "found an empty folder"),
        ([photos, "--out", photos / "crops"], "lies in"),
        ([torn, "--out", tmp_path / "g", "--already-cropped"], "none of 1 photos was kept; the first: "),
        ([photos, "--out", tmp_path / "h", "--set", "sharpnes=1"], "did you mean 'sharpness'"),
        ([photos, "--out", tmp_path / "i", "--size", 8], "size"),
    ):
        lines = hdb("prepare", *words, code=2).stderr.splitlines()
        errors = [one for one in lines if not one.startswith("prepare ")]  # the bar of a test is plain lines
        assert len(errors) == 1 and errors[0].startswith("error: ") and line in errors[0], lines
    assert report(tmp_path / "g")["counts"]["dropped"] == 1


def test_names_that_are_not_utf8_are_reported(photos: Path, tmp_path: Path) -> None:
    """Of a photo, which is dropped, and of the folder, which is escaped."""
    home = photos.rename(tmp_path / "album")
    try:
        (home / "ana" / "3.jpg").rename(home / "ana" / os.fsdecode(b"caf\xe9.jpg"))
        home = home.rename(tmp_path / os.fsdecode(b"\xe9t\xe9"))
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    result = hdb("prepare", home, "--out", tmp_path / "crops", "--already-cropped", "--set", "sharpness=0")
    entries = report(tmp_path / "crops")
    assert entries["counts"] == {"photos": 3, "kept": 2, "dropped": 1, "people": 1}
    assert (
        entries["photos"].endswith("\\udce9t\\udce9")
        and "caf\\udce9.jpg: the file's name is" in result.stdout
    )


def crops(out: Path) -> dict[str, bytes]:
    return {crop.name: crop.read_bytes() for crop in out.glob("ana/[!.]*.png")}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills otherwise")
def test_killed_with_its_workers_and_run_again(photos: Path, tmp_path: Path) -> None:
    """The real command, two processes, killed at work: no worker stays behind, and the end is the same."""
    image = Image.open(photos / "ana" / "1.jpg")
    for k in range(40):
        image.rotate(k / 10).save(photos / "ana" / f"more-{k:02d}.png")
    words = ["prepare", photos, "--already-cropped", "--size", 256, "--workers"]
    hdb(*words, 1, "--out", tmp_path / "whole")
    command = [
        sys.executable,
        "-m",
        "hyperdreambooth",
        *map(str, words),
        "2",
        "--out",
        str(tmp_path / "killed"),
    ]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(crops(tmp_path / "killed")) < 10:
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"ended by itself with {job.wait(timeout=0.05)}")
    children = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=60)[1]
    whole, part = crops(tmp_path / "whole"), crops(tmp_path / "killed")
    assert 10 <= len(part) < len(whole) and part.items() <= whole.items()
    hdb(*words, 1, "--out", tmp_path / "killed")
    assert crops(tmp_path / "killed") == whole
    assert report(tmp_path / "killed")["counts"] == report(tmp_path / "whole")["counts"]
