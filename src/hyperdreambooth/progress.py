"""Progress of a long job, through the logger `hyperdreambooth`.

On a terminal it is a bar. Elsewhere it is an INFO record every ten seconds, which appears where logging is
configured: the command line does that, and Python users call `logging.basicConfig(level=logging.INFO)`.
`logging.getLogger("hyperdreambooth").setLevel(logging.WARNING)` turns off both.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any, Self

import rich.progress
from rich.console import Console

from hyperdreambooth.events import Events

EVERY = 10.0  # seconds between log records

logger = logging.getLogger("hyperdreambooth")


class Progress:
    """A bar on standard error or lines in the log, as a context manager.

    The total is None if it is unknown, and `done` steps are those that a resumed job has behind it. `events`
    are those of a run that should say how far it is.
    """

    def __init__(self, name: str, total: int | None, done: int = 0, events: Events | None = None) -> None:
        self.name, self.total, self.done = name, total, done
        self._events, self._frame = events, ExitStack()
        self._first, self._values = done, ""
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        self._start = self._logged = time.monotonic()
        if self._events is not None:
            self._frame.enter_context(self._events.running(self.name, self.total, self.done))
        console = Console(stderr=True)
        if console.is_terminal and logger.level <= logging.INFO:
            columns = [*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn()]
            values = rich.progress.TextColumn("{task.fields[values]}")
            self._bar = rich.progress.Progress(*columns, values, console=console)
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, values="")
            self._bar.start()
        return self

    def start_at(self, done: int) -> None:
        """Counts from the steps that a resumed job has behind it."""
        self.done = self._first = done
        if self._events is not None and done:
            self._events.add("progress", done=done)
        self.update(0)

    def update(self, steps: int = 1, **values: float | str) -> None:
        """Counts `steps` more steps and shows the newest values, such as the loss."""
        self.done += steps
        if values:
            texts = {name: v if isinstance(v, str) else f"{float(v):.4g}" for name, v in values.items()}
            self._values = " ".join(f"{name} {text}" for name, text in texts.items())
        if self._events is not None:
            self._events.progress(self.done, values=self._values)
        if self._bar is not None:
            shown = " ".join(filter(None, (self._speed(), self._values)))
            self._bar.update(self._task, completed=self.done, values=shown)
        elif time.monotonic() - self._logged >= EVERY and self.done != self.total:
            self._log()

    def _speed(self) -> str:
        """Returns the steps a second."""
        steps, seconds = self.done - self._first, time.monotonic() - self._start
        return f"{steps / seconds:.3g}/s" if steps > 0 and seconds > 0 else ""

    def _log(self) -> None:
        """Logs the steps, the seconds, the steps a second and the values."""
        self._logged = time.monotonic()
        seconds = self._logged - self._start
        total = "" if self.total is None else f"/{self.total}"
        parts = (f"{self.name} {self.done}{total}", f"{seconds:.0f} s", self._speed(), self._values)
        logger.info(", ".join(filter(None, parts)))

    def __exit__(self, *error: Any) -> None:
        if self._events is not None:
            self._events.add("progress", done=self.done, values=self._values)
        self._frame.__exit__(*error)
        if self._bar is not None:
            self._bar.stop()
        else:
            self._log()
