"""An experiment on the micro base, as the command makes it, and what its tests ask of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperdreambooth.base.load import load_base
from hyperdreambooth.evaluate.config import EvaluateConfig
from hyperdreambooth.evaluate.methods import Makers
from hyperdreambooth.evaluate.protocol import Protocol, Row
from hyperdreambooth.evaluate.report import summary
from hyperdreambooth.evaluate.scorers import load_scorers
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.hypernet.predictor import load_hypernet

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


def made(
    home: Path, photos: Path, out: Path, network: str | None = "made", loading: Any = None, **fields: Any
) -> Protocol:
    """An experiment as the command makes it."""
    base = load_base(home / "base", device="cpu", **(loading or {}))
    makers = Makers(base, load_hypernet(home / network) if network else None, None, None)
    config = EvaluateConfig(**{**QUICK, **fields})
    return Protocol(makers, load_scorers(base, None, None, None), read_faces(photos), config, out)


def renamed(home: Path, folder: Path, **facts: Any) -> Path:
    """The hypernetwork of `home` with other words or another strength."""
    shutil.copytree(home / "made", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "facts": {**config["facts"], **facts}}))
    return folder


def scores(experiment: Protocol, rows: Mapping[str, Row]) -> str:
    """All scores of a report, as they are written."""
    told = summary(experiment, rows)
    figures = {name: row["scores"] for name, row in told["rows"].items()}
    return json.dumps([figures, told["paired"], told["people"]])


def cells(experiment: Protocol, name: str) -> dict[str, set[str]]:
    return {p: {cell.file.stem for cell in experiment.cells(name, p)} for p in experiment.people}


def written(out: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
