"""Which worker gets which unit: the rules of the hand-out, without any machine.

A unit is worked on by one worker at a time, and its result does not depend on who works on it. So a lost
unit is simply given out again. A unit that a slow worker still holds at the end is given to a second worker,
if that one will be done sooner, and the first result counts. Ray's loop (`on_ray.py`), the tests and the
simulation of `benchmarks/cluster.py` all use these rules.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

Unit = TypeVar("Unit")

LOSSES = 20
"""How many workers may be lost over one unit, before the unit itself is held to be the cause."""
OVERDUE = 1.5
"""How many times the usual seconds of a unit a worker may take, before it is held to be slow."""


@dataclass(frozen=True)
class _Running:
    number: int
    since: float


class Desk(Generic[Unit]):
    """Hands out units, numbered from 0 in their order, and takes note of what becomes of them.

    Times are seconds on any clock that only moves forward.
    """

    def __init__(self, units: Iterable[Unit], ahead: int | None = None) -> None:
        """Takes the units, which are read one by one as they are wanted.

        Args:
            units: what there is to do.
            ahead: how many units may be given out past the first that is unfinished; None for any number.
        """
        self._source, self._ahead = iter(units), ahead
        self._open: dict[int, Unit] = {}  # given out at least once and not finished
        self._again: deque[int] = deque()
        self._running: dict[str, _Running] = {}
        self._took: dict[str, float] = {}  # what each worker's last unit took
        self._losses: Counter[int] = Counter()
        self._number, self._waiting = 0, list[Unit]()
        self._read()

    def _read(self) -> None:
        """Reads one unit ahead, to know whether there is one."""
        self._waiting = [*islice(self._source, 1)]

    @property
    def finished(self) -> bool:
        """Whether every unit has a result."""
        return not self._waiting and not self._open

    def hand_out(self, idle: Iterable[str], now: float) -> Iterator[tuple[str, int, Unit]]:
        """Yields a worker, the number of its next unit and the unit, until the others have to wait."""
        for worker in sorted(idle, key=self._usual):  # the fastest first: it is done sooner
            number = self._next(worker, now)
            if number is None:
                return
            self._running[worker] = _Running(number, now)
            yield worker, number, self._open[number]

    def _usual(self, worker: str) -> float:
        """Returns the seconds that a worker needs for a unit; a new one those of the others."""
        if worker in self._took or not self._took:
            return self._took.get(worker, 0.0)
        return statistics.median(self._took.values())

    def _next(self, worker: str, now: float) -> int | None:
        if self._again:
            return self._again.popleft()
        if self._waiting and (self._ahead is None or self._number - self._first() < self._ahead):
            self._open[self._number] = self._waiting[0]
            self._number += 1
            self._read()
            return self._number - 1
        return self._second_copy(worker, now)

    def _first(self) -> int:
        """Returns the number of the first unfinished unit."""
        return min(self._open, default=self._number)

    def _second_copy(self, worker: str, now: float) -> int | None:
        """Returns the unit that would be finished latest, if this worker needs less time for all of it."""
        if not self._took:
            return None
        copies = Counter(running.number for running in self._running.values())
        left = {
            running.number: self._left(other, running, now)
            for other, running in self._running.items()
            if running.number in self._open and copies[running.number] == 1
        }
        slowest = max(left, key=lambda number: left[number], default=None)
        return slowest if slowest is not None and left[slowest] > self._usual(worker) else None

    def _left(self, worker: str, running: _Running, now: float) -> float:
        """Returns the seconds until a worker should be done; one that is long overdue may never be."""
        usual, passed = self._usual(worker), now - running.since
        return max(usual - passed, 0.0) if passed < OVERDUE * usual else float("inf")

    def done(self, worker: str, now: float) -> int | None:
        """Notes a result; returns the unit's number, or None if another worker was first."""
        running = self._running.pop(worker)
        self._took[worker] = now - running.since
        return running.number if self._open.pop(running.number, None) is not None else None

    def lost(self, worker: str) -> int | None:
        """Notes that a worker is gone; returns the number of the unit that is given out again, if any.

        Raises:
            OSError: so many workers were lost over this unit that it must be the cause.
        """
        self._took.pop(worker, None)
        running = self._running.pop(worker, None)
        if running is None or running.number not in self._open:
            return None
        self._losses[running.number] += 1
        if self._losses[running.number] == LOSSES:
            raise OSError(
                f"{LOSSES} workers died over unit {running.number}; see Ray's logs for the cause, or make "
                "units smaller"
            )
        if any(other.number == running.number for other in self._running.values()):
            return None
        self._again.append(running.number)
        return running.number


def in_order(results: Iterable[tuple[int, Unit]]) -> Iterator[Unit]:
    """Yields numbered results in the order of their numbers, each as soon as those before it are there."""
    early: dict[int, Unit] = {}
    following = 0
    for number, result in results:
        early[number] = result
        while following in early:
            yield early.pop(following)
            following += 1
