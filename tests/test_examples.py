"""The example program does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

from hyperdreambooth.adapter import read_adapter
from hyperdreambooth.base.load import load_base
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, load_hypernet

EXAMPLE = Path(__file__).parent.parent / "examples" / "one_file.py"


def test_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    made = example["main"](None, tmp_path, steps=2, draw_steps=2)
    base, distance = load_base(device="cpu"), example["distance"]
    learned = load_hypernet(EMBEDDED_HYPERNET).basis
    read, prediction = (
        read_adapter(tmp_path / name, base.sites, base.fingerprint, lambda _: learned)
        for name in ("pytorch_lora_weights.safetensors", "prediction.safetensors")
    )
    assert (read.kind, prediction.kind, made.rank) == ("lora", "lidb", 4)
    assert distance(read, made) < 1e-5 < distance(prediction, made)
    assert distance(prediction, prediction.relax(4)) < 1e-5
    with Image.open(tmp_path / "pictures.png") as picture:
        assert picture.size == (3 * base.resolution, 4 * base.resolution)
    assert "finetuned 2 steps" in capsys.readouterr().out
