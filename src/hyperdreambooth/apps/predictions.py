"""`hdb predict` for many people: an adapter for each, made here, on a cluster, or in shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from hyperdreambooth.apps.elsewhere import check_shared
from hyperdreambooth.apps.loading import load_personalizer
from hyperdreambooth.apps.settings import BaseConfig, Job, settings_of
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.cluster.shards import Shard, check_shards, forget_shards
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.progress import Progress

Person: TypeAlias = tuple[str, tuple[Photo, ...]]
Form: TypeAlias = Any
"""The form of an adapter's file, see `Adapter.save`."""


def predictor(base: BaseConfig, hypernet: str | None, out: Path, form: Form) -> Callable[[Person], Path]:
    """The recipe of `predict`: writes a person's adapter, and returns the file."""
    personalizer = load_personalizer(base, hypernet)

    def predict(person: Person) -> Path:
        name, photos = person
        distance = personalizer.distance(photos)
        if distance is not None and distance > 1:
            found = f"unlike those of the hypernetwork's training ({distance:.2f}, the limit is 1)"
            warnings.warn(f"{name}: the photo is {found}; expect a poor likeness", stacklevel=1)
        personalizer.predict(photos).save(file := _file(out, name), form)
        return file

    return predict


def _file(out: Path, name: str) -> Path:
    return out / f"{name}.safetensors"


def predict_people(
    job: Job[Any], folder: Path, out: Path, form: Form, hypernet: str | None, cluster: str | None,
    shard: str | None,
) -> str:  # fmt: skip
    """Predicts everybody of a folder, or the people of one shard; returns what to tell the user."""
    people = [*read_faces(folder).items()]
    part = Shard.parse(shard) if shard else None
    if shard and part is None:
        names = [name for name, _ in people]
        check_shards(out, _settings(job, form), names, lambda name: _file(out, name).is_file())
    else:
        own = part.part(people) if part else people
        recipe = partial(predictor, job.base, hypernet, out, form)
        _predict(job, recipe, own, out, cluster)
        if part:
            part.record(out, _settings(job, form), [name for name, _ in own])
            return f"{out}: shard {part}, {len(own)} people; merge when all shards are done"
    forget_shards(out)
    job.report(out, photos=str(folder), people=[name for name, _ in people])
    return f"{out}: {len(people)} people"


def _settings(job: Job[Any], form: Form) -> dict[str, Any]:
    return {**settings_of(job), "form": form}


def _predict(
    job: Job[Any], recipe: Callable[[], Callable[[Person], Path]], people: Sequence[Person], out: Path,
    cluster: str | None,
) -> None:  # fmt: skip
    """Has the people predicted, here or on a cluster."""
    if cluster:
        results: Iterable[tuple[int, Path]] = OnRay(cluster, job.base.device)(recipe, people, title="predict")
        with job.stage("predict"):
            for _, file in results:
                check_shared(out, [file])
        return
    with job.stage("load"):
        predict = recipe()
    with job.stage("predict"), Progress("predict", len(people)) as bar:
        for person in people:
            predict(person)
            bar.update(1)
