"""The command that measures how a base draws, with networks that have learned nothing, on eight pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.looks import LooksConfig


def test_the_command_measures_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import looks

    tiny = StageConfig(steps=1, batch=8, people=4, each=2, precision="float32")
    config = LooksConfig(evenness=tiny, features=tiny, held_out=4)
    words = ["--count", "8", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "looks.json")]
    looks.main(words, config)
    found = json.loads((tmp_path / "looks.json").read_text())
    assert found["pictures"] == 8 and set(found["judges"]) == {"evenness", "features"}
    assert set(found["distance_to_rendered"]) == {"drawn", "others", "others, VAE"}
    assert all(row["frechet"] > 0 for row in found["distance_to_rendered"].values())
    assert set(found["evenness"]) == {"drawn", "rendered", "others", "others, VAE"}
    assert set(found["reader_right"]) == {"rendered", "skewed", "rendered, VAE", "skewed, VAE"}
    assert found["attributes"]["rendered"]["prompt"] > 0.9 and found["attributes"]["drawn"]["prompt"] > 0.6
    with Image.open(tmp_path / "looks.jpg") as sheet:
        assert sheet.size == (8 * 130 + 6, 130 + 6)
    assert "of few pictures are too large" in capsys.readouterr().out

    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    looks.main(words, config)
    assert json.loads((tmp_path / "looks.json").read_text()) == found
    assert kept == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()
    }
