"""Runs commands as users type them, and reads what they print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from hyperdreambooth.apps.cli import app

SMALL = ["--set", "down_dim=4", "--set", "up_dim=3"]
QUICK = ["--set", "draw_steps=2", "--set", "batch=2"]


def hdb(*words: object, code: int = 0) -> Result:
    """Runs a command and checks its exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def error(*words: object) -> str:
    """Runs a command on bad input and returns its one line of error."""
    lines = hdb(*words, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def report(out: Path) -> dict[str, Any]:
    """Reads the report beside a file or in a folder."""
    file = out / "report.json" if out.is_dir() else out.with_name(f"{out.name}.report.json")
    return json.loads(file.read_text())


def photo(micro_photos: Path) -> Path:
    return micro_photos / "person-0" / "0.png"


def with_network(made: Path, micro_dir: Path) -> list[object]:
    return ["--base", micro_dir, "--device", "cpu", "--hypernet", made / "hypernet"]
