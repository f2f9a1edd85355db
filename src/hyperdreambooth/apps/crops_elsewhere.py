"""The work of `prepare` on other machines, or in other processes. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from hyperdreambooth.apps.settings import Job, settings_of
from hyperdreambooth.cluster.desk import in_order
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.cluster.shards import Shard, check_shards
from hyperdreambooth.faces.config import PrepareConfig
from hyperdreambooth.faces.prepare import HandOut, Outcome, Task, merge_parts, part_names, prepare_part

TOGETHER = 32
"""The photos of a unit: seconds of work, against milliseconds for handing it out."""
AHEAD = 4
"""The units that a worker may be ahead of the first unfinished one: outcomes are wanted in order."""


def cropper() -> Callable[[list[Task | Outcome]], list[Outcome]]:
    """The recipe of `prepare`: what is known already is passed on."""
    return lambda unit: [one if isinstance(one, tuple) else one() for one in unit]


def photos_on_ray(address: str) -> HandOut:
    """Returns the hand-out of photos over a cluster, a worker for each core."""
    return partial(_spread, OnRay(address, "cpu"))


def _spread(on_ray: OnRay, tasks: Iterator[Task | Outcome]) -> Iterator[Outcome]:
    units = iter(lambda: [*islice(tasks, TOGETHER)], [])
    for outcomes in in_order(on_ray(cropper, units, ahead=AHEAD)):
        yield from outcomes


def prepare_shard(job: Job[PrepareConfig], photos: str, out: Path, shard: Shard, workers: int | None) -> int:
    """Crops the photos of one shard; returns how many there are."""
    names = prepare_part(photos, out, job.own, (shard.number, shard.of), workers)
    shard.record(out, settings_of(job), names)
    return len(names)


def collect_prepared(job: Job[PrepareConfig], photos: str, out: Path) -> None:
    """Collects what shards did; refuses to merge if something is missing."""
    check_shards(out, settings_of(job), part_names(photos, job.own), lambda _: True)
    merge_parts(out)
