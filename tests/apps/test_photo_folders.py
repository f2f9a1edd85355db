"""Odd folders of photos through `hdb`: what is not used is on the terminal and in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import portrait
from hyperdreambooth.apps.cli import app


def prepare(folder: Path, out: Path) -> str:
    words = ["prepare", folder, "--out", out, "--already-cropped", "--size", 64, "--workers", 1]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Four photos; one caption cannot be read, one is for no photo, and a film lies beside them."""
    home = tmp_path / "photos" / "ana"
    home.mkdir(parents=True)
    for number, name in enumerate(("1.jpg", "2.JPG", "3.jfif", "4.webp")):
        form = {"webp": "WEBP"}.get(name[-4:], "JPEG")
        portrait.astronaut().rotate(number).resize((128, 128)).save(home / name, form)
    (home / "1.caption").write_bytes("a [V] face, café".encode("cp1252"))
    (home / "2.jpg.txt").write_text("a [V] face, smiling", encoding="utf-16")
    (home / "3.txt").write_bytes(b"\xff\xfe\x00")
    (home / "5.txt").write_text("of a photo that is gone")
    (home / "1.MOV").write_bytes(bytes(99))
    return tmp_path / "photos"


def test_what_is_not_used_is_reported(album: Path, tmp_path: Path) -> None:
    shown = prepare(album, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["counts"]["kept"] == 3 and [one["crop"] for one in report["kept"]] == [
        "ana/1.png", "ana/2.png", "ana/4.png",
    ]  # fmt: skip
    (dropped,) = report["dropped"]
    assert dropped["photo"].endswith("3.jfif") and dropped["reason"].startswith("3.txt: expected a caption")
    ignored = {Path(one["name"]).name: one["reason"] for one in report["ignored"]}
    assert ignored["5.txt"] == "there is no photo of this name here" and ignored["1.MOV"].startswith(
        "not a photo"
    )
    assert len(ignored) == 2 and "ignored    " in shown and "5.txt: there is no photo" in shown
    texts = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "out" / "ana").glob("*.txt")}
    assert texts == {"1.txt": "a [V] face, café\n", "2.txt": "a [V] face, smiling\n"}
    again = prepare(tmp_path / "out", tmp_path / "crops of crops")
    assert "ignored" not in again  # what prepare writes itself is not strange to it
