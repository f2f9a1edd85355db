"""The work of a command on other machines, or in other processes: what a worker loads, and what it does.

A recipe is called once in each worker, loads what stays warm, and returns what makes a result of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hyperdreambooth.apps.loading import load
from hyperdreambooth.apps.settings import BaseConfig, Job
from hyperdreambooth.base.load import Base
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.cluster.shards import Shard, check_shards
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.preopt.bank_training import GroupTrainer, groups_of, prepare, run_of
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.preopt.groups import Group, HandOut, Results


def at_home(config: BaseConfig) -> BaseConfig:
    """Returns the base's config for the process that only hands out: it leaves the GPUs to the workers."""
    return config.model_copy(update={"device": "cpu"})


def settings_of(job: Job[Any]) -> Mapping[str, Any]:
    """Returns what all shards of a job have in common."""
    return {"command": job.command, **job.flat()}


def trainer(base: BaseConfig, out: Path, config: PreoptConfig) -> GroupTrainer:
    """The recipe of `preoptimize`. No checkpoints: two workers may be at work on the last groups."""
    return GroupTrainer(prepare(load(base), config), out, checkpoints=False)


def groups_on_ray(job: Job[PreoptConfig], out: Path, address: str) -> HandOut:
    """Returns the hand-out of groups over a cluster."""
    recipe = partial(trainer, job.base, out, job.own)
    return partial(OnRay(address, job.base.device), recipe, title="preoptimize", size=_people)


def _people(group: Group) -> int:
    return len(group.names)


def preoptimize_shard(job: Job[PreoptConfig], base: Base, photos: Path, out: Path, shard: Shard) -> int:
    """Trains the groups of one shard; returns the number of their people."""
    stage, groups, kept = _open(job, base, photos, out)
    own = shard.part(groups)
    missing = [group for group in own if group not in kept]
    for place, trained in GroupTrainer(stage, out).each(missing):
        kept.save(missing[place], trained)
    shard.record(out, settings_of(job), [group.key for group in own])
    return sum(map(_people, own))


def check_preoptimized(job: Job[PreoptConfig], base: Base, photos: Path, out: Path) -> None:
    """Refuses to merge shards of which something is missing; a bank with everybody needs no shards."""
    _, groups, kept = _open(job, base, photos, out)
    if groups:
        there = {group.key for group in groups if group in kept}
        check_shards(out, settings_of(job), [group.key for group in groups], there.__contains__)


def _open(
    job: Job[PreoptConfig], base: Base, photos: Path, out: Path
) -> tuple[Any, Sequence[Group], Results]:
    """Returns the stage, the groups of people who are in no bank yet, and the results that are there."""
    people, stage = read_faces(photos), prepare(base, job.own)
    there = Bank.open(out).identities if (out / "manifest.json").is_file() else ()
    run_of(stage, out)
    return stage, groups_of(stage, people, there), Results(out / "groups")
