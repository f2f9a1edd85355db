"""Every command of docs/training.md's recipe runs, on tiny random weights in place of the published bases."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pipelines
from hyperdreambooth.apps.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
LINES = re.findall(r"^hdb (.+)$", "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)), re.MULTILINE)
BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD 1.5",
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "stabilityai/stable-diffusion-3.5-medium": "SD3",
}
SMALL = "steps=1 batch=2 width=8 heads=2 layers=1 validation=1 draws=1 down_dim=6 up_dim=4 device=cpu"
SHORT = "steps=1 draw_steps=1 batch=1 device=cpu"


def tiny(line: str, bases: dict[str, Path], eye: Path) -> list[str]:
    """The line with a tiny base, crops as they are, and few steps."""
    words = [str(bases.get(word, word)) for word in shlex.split(line)]
    if words[0] == "prepare":
        return [*words, "--already-cropped", "--set", "sharpness=0", "--set", "most_enlarged=99"]
    own = {"train": f"{SMALL} encoder={eye} dtype=float32 variant=null", "personalize": SHORT}.get(
        words[0], ""
    )
    return [*words, *(part for setting in own.split() for part in ("--set", setting))]


@pytest.mark.filterwarnings("ignore:.*after the end of what is read")  # 16 tokens
def test_the_recipe_runs_line_by_line(
    micro_photos: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_photos, "albums")
    shutil.copy(micro_photos / "person-0" / "0.png", "ana.jpg")
    bases = {name: tmp_path / kind for name, kind in BASES.items()}
    for name, kind in BASES.items():
        pipelines.FAMILIES[kind]().save_pretrained(bases[name])
    assert {line.split()[0] for line in LINES} == {"prepare", "doctor", "train", "personalize"}
    for line in LINES:
        done = CliRunner().invoke(app, tiny(line, bases, made / "encoder"))
        assert done.exit_code == 0, (line, done.output)
