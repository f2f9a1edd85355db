"""What happens in a run, line by line in `events.jsonl`, and what can be seen from it while the run goes on.

Every line has the kind of the event and the time. `start` names the process, `progress` comes every ten
seconds at most, `unit`, `checkpoint` and `lost` (a worker) when they happen, and `end` or `error` comes last.
A process that was killed writes no last line: then the last time is old and the process is gone. Where a loss
stops all processes, `lost` has `restart`, and another `start` comes after it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from hyperdreambooth.files import InputError, first_line, room_for

Event: TypeAlias = Mapping[str, Any]
EVERY = 10.0  # seconds between two `progress` events
SILENT = 300.0  # seconds without an event after which a process on another machine is worth a look
GOING = ("running", "starting again")  # the states of a run that needs nobody
_WINDOW = 30  # the last events that the speed is taken from
_COUNTING = ("start", "progress", "unit", "end")


class Events:
    """The events of one run; lines are appended, so what is written stays."""

    def __init__(self, file: Path) -> None:
        self.file, self._told = file, 0.0

    def add(self, kind: str, **facts: Any) -> None:
        """Appends an event with its time."""
        self._told = time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = {"event": kind, "time": round(time.time(), 3), **facts}
        with room_for(self.file), self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    def progress(self, done: int, **values: str) -> None:
        """Appends how far the run is, unless something else was written a moment ago."""
        if time.monotonic() - self._told >= EVERY:
            self.add("progress", done=done, **values)

    @contextmanager
    def running(self, title: str, total: int | None, done: int = 0) -> Generator[None]:
        """Frames the work with `start` and `end`, or with `error` and what went wrong."""
        import psutil  # accelerate needs it, too

        process = psutil.Process()
        who = {"host": platform.node(), "pid": process.pid, "born": process.create_time()}
        self.add("start", title=title, total=total, done=done, **who)
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.add("error", what="interrupted" if interrupted else _described(error))
            raise
        self.add("end")


def _described(error: BaseException) -> str:
    """Returns one line; that of a user's mistake needs no name."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"


@dataclass(frozen=True)
class Status:
    """What is known of a run.

    Attributes:
        title: what runs.
        place: machine and process.
        state: one phrase, such as `running`, `finished` or `ended without a word`.
        done, total: steps or units; the total is None if it is unknown.
        rate: steps or units a second; 0 while it is unknown.
        left: the seconds that are left; None while they are unknown.
        silent: the seconds since the last event.
        checkpoint: the step of the last checkpoint.
        units: the units that are done since the last start.
        lost: the workers that were lost since the command was started.
        starts: how often the run was started.
        values: the newest figures.
    """

    title: str
    place: str
    state: str
    done: int
    total: int | None
    rate: float
    left: float | None
    silent: float
    checkpoint: int | None = None
    units: int = 0
    lost: list[str] = field(default_factory=list[str])
    starts: int = 1
    values: str = ""


def read_events(file: Path) -> list[Event]:
    """Reads the events of a run; a line that a kill has cut off is left out."""
    events: list[Event] = []
    with suppress(FileNotFoundError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and {"event", "time"} <= event.keys():
                    events.append(event)
    return events


def alive(start: Event) -> bool | None:
    """Returns whether the process of a `start` still runs; None if it runs on another machine."""
    import psutil

    if start.get("host") != platform.node():
        return None
    with suppress(psutil.Error):
        process = psutil.Process(int(start["pid"]))
        same = abs(process.create_time() - float(start["born"])) < 2  # else the number was given again
        return same and process.status() != psutil.STATUS_ZOMBIE
    return False


def status_of(
    events: Sequence[Event], now: float, living: Callable[[Event], bool | None] = alive
) -> Status | None:
    """Says what is known of a run from its events; None if it has not started.

    Args:
        events: the events of the run, oldest first.
        now: the time, in seconds since 1970.
        living: says whether the process of a `start` still runs.
    """
    starts = [k for k, event in enumerate(events) if event["event"] == "start"]
    if not starts:
        return None
    start, recent, command = events[starts[-1]], events[starts[-1] :], events[_command(events, starts) :]
    counted = [event for event in recent if event["event"] in _COUNTING and "done" in event][-_WINDOW:]
    done, total, rate = int(counted[-1]["done"]), start.get("total"), _rate(counted)
    silent = max(0.0, now - float(recent[-1]["time"]))
    state = _state(recent, silent, living)
    going = state.startswith("running") and rate > 0 and total is not None
    return Status(
        title=str(start.get("title", "")),
        place=f"{start.get('host')}, process {start.get('pid')}",
        state=state,
        done=done,
        total=total,
        rate=rate,
        left=max(0.0, (int(total or 0) - done) / rate - silent) if going else None,
        silent=silent,
        checkpoint=next((e.get("step") for e in reversed(recent) if e["event"] == "checkpoint"), None),
        units=sum(event["event"] == "unit" for event in recent),
        lost=[str(event.get("what", "a worker")) for event in command if event["event"] == "lost"],
        starts=len(starts),
        values=str(next((e["values"] for e in reversed(recent) if e.get("values")), "")),
    )


def _command(events: Sequence[Event], starts: Sequence[int]) -> int:
    """Returns the place of the last start that no loss has caused: somebody started the command."""
    caused = {after for before, after in pairwise(starts) if any(map(_restarts, events[before:after]))}
    return max(place for place in starts if place not in caused)


def _restarts(event: Event) -> bool:
    """Returns whether all processes are started again after an event."""
    return event["event"] == "lost" and bool(event.get("restart"))


def _rate(counted: Sequence[Event]) -> float:
    """Returns the steps a second over the last events that count them."""
    seconds = float(counted[-1]["time"]) - float(counted[0]["time"])
    return (int(counted[-1]["done"]) - int(counted[0]["done"])) / seconds if seconds > 0 else 0.0


def _state(recent: Sequence[Event], silent: float, living: Callable[[Event], bool | None]) -> str:
    """Returns the phrase for the last start."""
    last = recent[-1]
    if any(event["event"] == "end" for event in recent):  # a worker may be lost after it
        return "finished"
    if any(map(_restarts, recent)) and silent <= SILENT:
        return "starting again"
    if last["event"] == "error":
        what = str(last.get("what", ""))
        return what if what == "interrupted" else f"failed: {what}"
    runs = living(recent[0])
    if runs is False:
        return "ended without a word: it was killed, or the machine went down; run the same command again"
    if runs is None and silent > SILENT:
        return f"silent on {recent[0].get('host')}, which cannot be asked from here; look there"
    return "running"
