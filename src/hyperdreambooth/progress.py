"""Progress of a long job: a bar on a terminal, plain lines elsewhere, nothing when HDB_QUIET=1."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console

EVERY = 10.0  # seconds between plain lines


class Progress:
    """A bar on standard error, as a context manager.

    Args:
        name: what is being done.
        total: steps in all; None where nobody knows.
        done: steps a resumed job has behind it.
    """

    def __init__(self, name: str, total: int | None, done: int = 0) -> None:
        self.name, self.total, self.done = name, total, done
        self._first, self._figures = done, ""
        self._quiet = os.environ.get("HDB_QUIET") == "1"
        self._console = Console(stderr=True)
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        self._start = self._told = time.monotonic()
        if self._console.is_terminal and not self._quiet:
            columns = [*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()]
            figures = rich.progress.TextColumn("{task.fields[figures]}")
            self._bar = rich.progress.Progress(*columns, figures, console=self._console)
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, figures="")
            self._bar.start()
        return self

    def start_at(self, done: int) -> None:
        """Counts from what a resumed job has behind it."""
        self.done = self._first = done
        self.update(0)

    def update(self, steps: int = 1, **figures: float | str) -> None:
        """Report ``steps`` more steps done, with the newest figures."""
        self.done += steps
        if figures:
            self._figures = " ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, figures=self._figures)
        elif time.monotonic() - self._told >= EVERY and self.done != self.total:
            self._tell()

    def _tell(self) -> None:
        """One plain line: where it is, how fast, the figures."""
        if self._quiet:
            return
        self._told = time.monotonic()
        seconds = self._told - self._start
        of = "" if self.total is None else f"/{self.total}"
        words = [f"{self.name} {self.done}{of}", f"{seconds:.0f} s"]
        if self.done > self._first and seconds > 0:
            words.append(f"{(self.done - self._first) / seconds:.3g}/s")
        line = ", ".join([*words, self._figures] if self._figures else words)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._tell()


def _short(value: float | str) -> str:
    """Figures to four digits; words as they are."""
    return value if isinstance(value, str) else f"{float(value):.4g}"
