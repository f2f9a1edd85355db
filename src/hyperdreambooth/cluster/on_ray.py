"""The hand-out over Ray: a warm actor for each GPU, or for some cores, on every machine of a cluster.

An actor loads what it works with once, then gets one unit at a time. Actors that are lost, with their machine
or alone, are replaced as soon as there is room, and their units are given out again. Ray's own retries are
off: they would wait for a machine that may never come back.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hyperdreambooth.cluster.desk import LOSSES, Desk
from hyperdreambooth.events import Events
from hyperdreambooth.files import InputError
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import environment

Recipe: TypeAlias = Callable[[], Callable[[Any], Any]]
"""Loads what a worker needs, and returns what makes a result of a unit. It is pickled for the workers."""

LOOK = 2.0
"""The seconds after which the cluster is looked at again: for new machines, and for units that are late."""
_SAME = ("hyperdreambooth", "torch", "diffusers", "transformers", "peft")

logger = logging.getLogger("hyperdreambooth")


class Worker:
    """What runs in an actor."""

    def begin(self, recipe: Recipe, versions: Mapping[str, str], folder: str) -> str:
        """Loads what the units need; returns the name of the machine.

        Paths mean what they mean where the command runs, if its working folder is on a shared disk.

        Raises:
            InputError: other versions are installed here than where the command runs.
        """
        node, own = platform.node(), environment()
        for package in _SAME:
            if own.get(package) != versions.get(package):
                raise InputError(
                    f"{node}: expected {package} {versions.get(package)}, as where the command runs, got "
                    f"{own.get(package)}; install the same versions everywhere"
                )
        with suppress(OSError):
            os.chdir(folder)
        self._work = recipe()
        return node

    def do(self, unit: Any) -> tuple[Any, list[str]]:
        """Returns the result of a unit and what was warned of."""
        with warnings.catch_warnings(record=True) as seen:
            result = self._work(unit)
        return result, [str(one.message) for one in seen]


@dataclass(frozen=True)
class OnRay:
    """A way to hand out units.

    Attributes:
        address: of Ray's head, or `auto` for the cluster that this machine belongs to, or `local` to start
            Ray on this machine alone.
        device: auto, cpu or cuda: whether an actor gets a GPU. `OMP_NUM_THREADS` says how many cores it gets.
        events: of the run, which are told of every worker that is lost.
    """

    address: str
    device: str = "auto"
    events: Events | None = None

    def __call__(
        self,
        recipe: Recipe,
        units: Iterable[Any],
        *,
        ahead: int | None = None,
        title: str = "",
        size: Callable[[Any], int] = lambda _: 1,
    ) -> Iterator[tuple[int, Any]]:
        """Yields numbered results in the order in which they come.

        Args:
            recipe: makes a worker ready.
            units: are numbered from 0; they and their results are pickled.
            ahead: how many units a worker may be ahead of the first unfinished one; None for any number.
            title: of the progress bar; empty for none.
            size: the steps of the bar that a unit counts for.

        Raises:
            InputError: no Ray, no cluster, no room in it, other versions there, or what a worker refuses.
        """
        with connected(self.address) as ray:
            ask = asked_for(ray, self.device)
            crew = _Crew(ray, recipe, ask, len(units) if isinstance(units, Sized) else None)
            room = room_for_workers(ray, ask, self.address)
            desk = Desk(units, ahead and ahead * room)
            total = sum(map(size, units)) if isinstance(units, Sequence) else None
            try:
                if not title:
                    yield from _results(crew, desk, self.events)
                    return
                with Progress(title, total) as bar:
                    sizes = [size(unit) for unit in units]
                    for number, result in _results(crew, desk, self.events):
                        bar.update(sizes[number], workers=crew.size)
                        yield number, result
            finally:
                crew.stop()


def _results(crew: _Crew, desk: Desk[Any], events: Events | None) -> Iterator[tuple[int, Any]]:
    """The loop: workers get their next unit before anybody looks at the results of the last ones."""
    results: list[tuple[int, Any]] = []
    while True:
        crew.fill()
        for worker, _, unit in desk.hand_out(crew.idle, time.monotonic()):
            crew.assign(worker, unit)
        yield from results
        if desk.finished:
            return
        results = []
        for worker, kind, value in crew.wait():
            if kind == "lost":
                _tell(events, f"{worker} ({value})", desk.lost(worker))
            elif kind == "done" and (number := desk.done(worker, time.monotonic())) is not None:
                results.append((number, value))


def _tell(events: Events | None, worker: str, number: int | None) -> None:
    """Says who is lost, and which unit that sets back, if any."""
    again = "" if number is None else f"; unit {number} is given out again"
    logger.info(f"{worker} is lost{again}")
    if events is not None:
        events.add("lost", what=f"{worker}{again}")


_Event: TypeAlias = tuple[str, Literal["begun", "done", "lost"], Any]
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}


class _Crew:
    """The actors: as many as the cluster has room for, and no more than there are units."""

    def __init__(self, ray: Any, recipe: Recipe, ask: Mapping[str, float], most: int | None) -> None:
        self._ray, self._ask, self._most = ray, ask, most
        self._recipe, self._versions = ray.put(recipe), environment()
        self._kind = ray.remote(Worker).options(max_restarts=0, max_task_retries=0, **ask)
        self._actors: dict[str, Any] = {}
        self._refs: dict[Any, str] = {}  # what a worker is doing → the worker
        self._homes: dict[str, str] = {}  # a worker that has begun → its machine
        self._started, self._looked, self._warned = 0, -LOOK, set[str]()
        self._unready = 0  # how many were lost, one after another, before they were ready
        self.idle: set[str] = set()

    @property
    def size(self) -> int:
        """How many workers are ready or at work."""
        return len(self._homes)

    def fill(self) -> None:
        """Starts actors where there is room for more, from time to time."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked, room = time.monotonic(), _room(self._ray, self._ask)
        while len(self._actors) < (room if self._most is None else min(room, self._most)):
            self._started += 1
            name = f"worker {self._started}"
            self._actors[name] = actor = self._kind.remote()
            self._refs[actor.begin.remote(self._recipe, self._versions, str(Path.cwd()))] = name

    def assign(self, worker: str, unit: Any) -> None:
        """Gives an idle worker its next unit."""
        self.idle.remove(worker)
        self._refs[self._actors[worker].do.remote(unit)] = worker

    def wait(self) -> list[_Event]:
        """Waits until something happens, or until it is time to look at the cluster again."""
        if not self._refs:  # nobody is left, and no machine is there
            time.sleep(LOOK)
            return []
        ready, _ = self._ray.wait([*self._refs], num_returns=1, timeout=LOOK)
        return [self._event(ref, self._refs.pop(ref)) for ref in ready]

    def _event(self, ref: Any, worker: str) -> _Event:
        errors = self._ray.exceptions
        try:
            value = self._ray.get(ref)
        except errors.RayTaskError as error:  # raised by the unit or by the recipe
            raise (error.cause or error) from error
        except errors.RayError as error:
            return worker, "lost", self._drop(worker, error)
        self.idle.add(worker)
        if worker not in self._homes:
            self._homes[worker], self._unready = value, 0
            return worker, "begun", value
        result, warned = value
        for text in set(warned) - self._warned:  # a thousand workers may warn of the same thing
            self._warned.add(text)
            warnings.warn(text, stacklevel=2)
        return worker, "done", result

    def _drop(self, worker: str, error: Exception) -> str:
        """Forgets a worker that is lost; returns where it was and what Ray calls the loss.

        One that was never ready is replaced after a while, as the next may share its fate.

        Raises:
            OSError: nobody is ready, and so many were lost before they were that no more are tried.
        """
        with suppress(self._ray.exceptions.RayError):  # it may be alive behind a broken connection
            self._ray.kill(self._actors.pop(worker))
        if home := self._homes.pop(worker, None):
            self._looked = -LOOK
            return f"{home}, {type(error).__name__}"
        self._unready += 1
        if self._unready >= LOSSES and not self._homes:
            raise OSError(f"{LOSSES} workers died before they were ready; see Ray's logs for the cause")
        return f"starting, {type(error).__name__}"

    def stop(self) -> None:
        """Ends all actors."""
        for actor in self._actors.values():
            self._ray.kill(actor)


@contextmanager
def connected(address: str) -> Generator[Any]:
    """Connects to Ray for the time of a block; a connection that is there already is used and left open."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the way of future versions of Ray
    try:
        import ray
    except ImportError:
        raise InputError("--cluster needs Ray: pip install 'hyperdreambooth[cluster]'") from None
    if ray.is_initialized():
        yield ray
        return
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        advice = "start one with: ray start --head; or pass local for this machine alone"
        raise InputError(f"--cluster {address}: no Ray cluster there ({reason}); {advice}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Tries whether anybody answers at an address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=10).close()


def asked_for(ray: Any, device: str) -> dict[str, float]:
    """Returns what an actor needs: one GPU where there are any, and as many cores as it has threads."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or 1)
    if device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1):
        return {"num_gpus": 1, "num_cpus": cores}
    return {"num_cpus": cores}


def _room(ray: Any, ask: Mapping[str, float]) -> int:
    """Returns how many workers fit into the machines that are alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(has.get(_RESOURCES[key], 0) // n) for key, n in ask.items()) for has in alive)


def room_for_workers(ray: Any, ask: Mapping[str, float], address: str) -> int:
    """Returns how many workers fit into a cluster.

    Raises:
        InputError: not even one.
    """
    room = _room(ray, ask)
    if not room:
        wanted = " and ".join(f"{_RESOURCES[key]}: {count}" for key, count in ask.items())
        raise InputError(f"--cluster {address}: no machine there has {wanted}; add one that has")
    return room
