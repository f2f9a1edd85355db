"""Commands that use a trained hypernetwork: predict, personalize, generate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperdreambooth.apps.options import (
    BaseName,
    ConfigFile,
    Device,
    DryRun,
    Form,
    HypernetName,
    Nothing,
    Photos,
    Rank,
    Sampling,
    Seed,
    Sets,
    StepsOrAuto,
    Weights,
    must_exist,
    resolve,
)
from hyperdreambooth.apps.report import Report, check_report

if TYPE_CHECKING:
    from PIL.Image import Image


def predict(
    photos: Photos,
    out: Annotated[Path, typer.Option("--out", help="The adapter to write (.safetensors).")],
    form: Annotated[Form, typer.Option("--format")] = "lidb",
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Photo to adapter, nothing trained."""
    settings = resolve("predict", Nothing, config, sets, base=base, device=device)
    if dry_run:
        return settings.show()
    report = Report("predict", settings.plain())
    from hyperdreambooth.apps import job

    job.check_file(out)
    shots = job.person(photos)
    with report.stage("load"):
        person = job.load_personalizer(settings.place, hypernet)
    with report.stage("predict"):
        adapter = person.predict([shot.path for shot in shots])
    adapter.save(out, form, person.base.resolution)
    report.write(out, photos=[str(photo) for photo in photos], rank=adapter.rank, trigger=adapter.trigger)
    typer.echo(str(out))


def personalize(
    photos: Photos,
    out: Annotated[Path, typer.Option("--out", help="Folder for adapters, pictures and report.json.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="[V] is the person; repeat it.")
    ] = None,
    rank: Rank = None,
    steps: StepsOrAuto = None,
    seed: Seed = None,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Photo to finished LoRA and pictures.

    Predict, relax, finetune, draw, score.
    """
    began = time.perf_counter()
    from hyperdreambooth.apps import job, show

    flags = {
        "rank": rank,
        "steps": steps,
        "seed": seed,
        "base": base,
        "device": device,
        "prompts": prompt or None,
    }
    settings = job.resolve_tuned("personalize", show.ShowConfig, hypernet, config, sets, **flags)
    if dry_run:
        return settings.show()
    show.show("personalize", settings, job.person(photos), [], out, hypernet, began)


def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", help="[V] is the person; repeat it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    adapter: Annotated[list[Path] | None, typer.Option("--adapter", help="Adapter file; repeat it.")] = None,
    weight: Weights = None,
    seed: Seed = None,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Draw prompts, wearing adapters.

    Any number of them together: a person and a style, say.
    """
    settings = resolve("generate", Sampling, config, sets, seed=seed, base=base, device=device)
    if dry_run:
        return settings.show()
    must_exist(*adapter or [])
    report = Report("generate", settings.plain())
    from hyperdreambooth.apps import job
    from hyperdreambooth.files import check_writable, whole_file
    from hyperdreambooth.generate import generate as run
    from hyperdreambooth.progress import Progress

    check_writable(out)
    check_report(out, "generate")
    own = settings.own
    names = [f"{at:03d}-{k}.png" for at in range(len(prompt)) for k in range(own.images)]
    with report.stage("load"):
        frozen = job.load(settings.place)
        worn = job.open_weighted(adapter or [], weight or [], frozen, hypernet)
    with report.stage("generate"), Progress("generate", len(names)) as bar:

        def keep(at: int, picture: Image) -> None:
            with whole_file(out / names[at]) as part:
                picture.save(part, format="PNG")
            bar.update(1)

        run(frozen, prompt, worn, drawn=keep, **own.model_dump())
    report.write(out, prompts=prompt, files=names, adapters=[str(file) for file in adapter or []])
    typer.echo(f"{out}: {len(names)} picture{'s'[: len(names) != 1]}")
