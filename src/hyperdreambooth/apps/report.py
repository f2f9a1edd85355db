"""`report.json`: what ran, with which config, versions and seed, and how many seconds each stage took."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_report(out: Path, command: str) -> None:
    """Refuses a folder with the report of another command, which would be lost.

    Raises:
        InputError: naming the other one.
    """
    from hyperdreambooth.files import InputError, read_json

    file = out / "report.json"
    told = read_json(file) if file.is_file() else {"command": command}
    maker = told.get("command") if isinstance(told, dict) else None
    if maker != command:
        raise InputError(f"out {out}: holds what {maker or 'another program'} has made; pass another --out")


class Report:
    """Collects the seconds of stages and writes the report beside the result.

    Args:
        command: its name.
        config: the resolved config, flat.
    """

    def __init__(self, command: str, config: Mapping[str, Any]) -> None:
        self.command, self.config = command, dict(config)
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Adds the seconds that the block takes to stage `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)

    def write(self, target: Path, **facts: Any) -> Path:
        """Writes `target/report.json` for a folder, `target.report.json` for a file; returns its path."""
        from hyperdreambooth.files import write_json
        from hyperdreambooth.runs import environment

        file = target / "report.json" if target.is_dir() else target.with_name(f"{target.name}.report.json")
        seconds = {**self.seconds, "total": round(time.perf_counter() - self._began, 3)}
        stamp = {"command": self.command, "config": self.config, "seed": self.config.get("seed")}
        write_json(file, {**stamp, **facts, "seconds": seconds, "environment": environment()})
        return file
