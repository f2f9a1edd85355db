"""`report.json`: what ran, with which config, versions and seed, and how many seconds each stage took."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyperdreambooth.apps.settings import Settings


def check_report(out: Path, command: str) -> None:
    """Refuses a folder that cannot be written to, or holds another command's report, which would be lost."""
    from hyperdreambooth.files import InputError, check_writable, read_json

    check_writable(out)
    file = out / "report.json"
    report = read_json(file) if file.is_file() else {"command": command}
    maker = report.get("command") if isinstance(report, dict) else None
    if maker != command:
        raise InputError(
            f"out {out}: expected a new folder or a result of {command}, found a result of "
            f"{maker or 'another program'}; pass another --out"
        )


class Report:
    """Measures the stages of a command and writes the report beside its result."""

    def __init__(self, settings: Settings[Any]) -> None:
        self._settings, self._seconds = settings, dict[str, float]()

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Adds the seconds that the block takes to the stage `name`."""
        began = time.perf_counter()
        yield
        self._seconds[name] = round(self._seconds.get(name, 0.0) + time.perf_counter() - began, 3)

    def write(self, target: Path, **entries: Any) -> None:
        """Writes `target/report.json` for a folder and `target.report.json` for a file, with more entries."""
        from hyperdreambooth.files import write_json
        from hyperdreambooth.runs import environment

        file = target / "report.json" if target.is_dir() else target.with_name(f"{target.name}.report.json")
        config = self._settings.flat()
        seconds = {**self._seconds, "total": round(time.perf_counter() - self._settings.began, 3)}
        stamp = {"command": self._settings.command, "config": config, "seed": config.get("seed")}
        write_json(file, {**stamp, **entries, "seconds": seconds, "environment": environment()})
