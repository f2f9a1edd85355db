"""The work of a command on other machines, or in other processes: what a worker loads, and what it does.

A recipe is called once in each worker, loads what stays warm, and returns what makes a result of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from hyperdreambooth.apps.evaluate import protocol_of
from hyperdreambooth.apps.loading import load
from hyperdreambooth.apps.settings import BaseConfig, Job, settings_of
from hyperdreambooth.base.load import Base
from hyperdreambooth.cluster.on_ray import OnRay, Recipe
from hyperdreambooth.cluster.shards import Shard, check_shards
from hyperdreambooth.evaluate.config import EvaluateConfig
from hyperdreambooth.evaluate.protocol import Protocol
from hyperdreambooth.events import Events
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.files import InputError
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.preopt.bank_training import GroupTrainer, groups_of, prepare, run_of
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.preopt.groups import Group, HandOut, Results
from hyperdreambooth.storage import Store


def at_home(job: Job[Any]) -> Job[Any]:
    """Returns the job for the process that only hands out: it leaves the GPUs to the workers."""
    return replace(job, base=job.base.model_copy(update={"device": "cpu"}))


def trainer(base: BaseConfig, out: Store, config: PreoptConfig) -> GroupTrainer:
    """The recipe of `preoptimize`. No checkpoints: two workers may be at work on the last groups."""
    return GroupTrainer(prepare(load(base), config), out, checkpoints=False)


def groups_on_ray(job: Job[PreoptConfig], out: Store, address: str) -> HandOut:
    """Returns the hand-out of groups over a cluster."""
    recipe = partial(trainer, job.base, out, job.own)
    on_ray = OnRay(address, job.base.device, Events(out.here / "events.jsonl"))
    return partial(on_ray, recipe, title="preoptimize", size=_people)


def _people(group: Group) -> int:
    return len(group.names)


def preoptimize_shard(job: Job[PreoptConfig], base: Base, photos: Path, out: Store, shard: Shard) -> int:
    """Trains the groups of one shard; returns the number of their people."""
    stage, groups, kept = _open(job, base, photos, out)
    own = shard.part(groups)
    missing = [group for group in own if group not in kept]
    for place, trained in GroupTrainer(stage, out).each(missing):
        kept.save(missing[place], trained)
    shard.record(_shared(out), settings_of(job), [group.key for group in own])
    return sum(map(_people, own))


def check_preoptimized(job: Job[PreoptConfig], base: Base, photos: Path, out: Store) -> None:
    """Refuses to merge shards of which something is missing; a bank with everybody needs no shards."""
    _, groups, kept = _open(job, base, photos, out)
    if groups:
        there = {group.key for group in groups if group in kept}
        check_shards(_shared(out), settings_of(job), [group.key for group in groups], there.__contains__)


def _open(
    job: Job[PreoptConfig], base: Base, photos: Path, out: Store
) -> tuple[Any, Sequence[Group], Results]:
    """Returns the stage, the groups of people who are in no bank yet, and the results that are there."""
    people, stage = read_faces(photos), prepare(base, job.own)
    there = Bank.open(out) if out.exists("manifest.json") else ()
    run_of(stage, out)
    return stage, groups_of(stage, people, there), Results(out.here / "groups")


def _shared(out: Store) -> Path:
    """Returns the folder that shards write their results to; an object store has none."""
    if out.local is None:
        raise InputError(f"{out}: --shard needs a folder that machines share; or use --cluster")
    return out.local


Part: TypeAlias = tuple[str, tuple[str, ...]]
"""A row of an experiment, and the people who are made together."""


def evaluator(
    job: Job[EvaluateConfig],
    people: Mapping[str, Sequence[Photo]],
    out: Path,
    adapter: Path | None,
    hypernet: str | None,
) -> Callable[[Part], list[Path]]:
    """The recipe of `evaluate`: makes a part's pictures and scores."""
    protocol = protocol_of(job, people, out, adapter, hypernet)
    return lambda part: protocol.part(*part)


def _parts(protocol: Protocol) -> list[Part]:
    return [(row, who) for row in protocol.methods for who in protocol.parts(row)]


def _key(part: Part) -> str:
    row, who = part
    return f"{row}: {', '.join(who)}"


def evaluate_on_ray(job: Job[EvaluateConfig], protocol: Protocol, recipe: Recipe, address: str) -> None:
    """Has all parts made; the protocol then finds their pictures and scores."""
    parts = _parts(protocol)
    results = OnRay(address, job.base.device)(recipe, parts, title="evaluate", size=lambda part: len(part[1]))
    for _, files in results:
        check_shared(protocol.out, files)


def check_shared(out: Path, files: Iterable[Path]) -> None:
    """Refuses an output that a worker wrote to its own disk."""
    if lost := next((file for file in files if not file.is_file()), None):
        raise InputError(
            f"{out}: a worker wrote {lost}, which is not here; pass an --out that machines share"
        )


def evaluate_shard(job: Job[EvaluateConfig], protocol: Protocol, shard: Shard) -> int:
    """Makes the parts of one shard; returns how many there are."""
    own = shard.part(_parts(protocol))
    for part in own:
        protocol.part(*part)
    shard.record(protocol.out, settings_of(job), [*map(_key, own)])
    return len(own)


def check_evaluated(job: Job[EvaluateConfig], protocol: Protocol) -> None:
    """Refuses to merge shards of which something is missing."""
    check_shards(protocol.out, settings_of(job), [*map(_key, _parts(protocol))], lambda _: True)
