"""Commands that train: one person (dreambooth, finetune), many (preoptimize), the hypernetwork (train)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hyperdreambooth.apps.options import (
    BaseName,
    ConfigFile,
    Device,
    DryRun,
    HypernetName,
    Photos,
    Rank,
    Seed,
    Sets,
    Steps,
    StepsOrAuto,
    must_exist,
    named_path,
    resolve,
)
from hyperdreambooth.apps.report import Report

People = Annotated[
    Path,
    typer.Argument(help="Folder of photos, one sub-folder a person.", parser=named_path),
]


def dreambooth(
    photos: Photos,
    out: Annotated[Path, typer.Option("--out", help="Run folder; the adapter lies there at the end.")],
    method: Annotated[
        str | None,
        typer.Option("--method", help="lidb, lora, full or textual-inversion.", show_default=False),
    ] = None,
    rank: Rank = None,
    steps: StepsOrAuto = None,
    seed: Seed = None,
    base: BaseName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Train one person from scratch.

    Light-weight numbers (lidb), an ordinary LoRA, all of the base's weights (full: DreamBooth as published),
    or the vector of one word (textual-inversion).
    """
    from hyperdreambooth.apps import job
    from hyperdreambooth.finetune.config import DreamboothConfig
    from hyperdreambooth.finetune.dreambooth import dreambooth as run
    from hyperdreambooth.runs import check_run

    flags = {"method": method, "rank": rank, "steps": steps, "seed": seed, "base": base, "device": device}
    settings = resolve("dreambooth", DreamboothConfig, config, sets, **flags)
    if dry_run:
        return settings.show()
    check_run(out)
    report, shots = Report("dreambooth", settings.plain()), job.person(photos)
    with report.stage("load"):
        frozen = job.load(settings.place)
    with report.stage("train"):
        person = run(frozen, shots, out, settings.own)
    files = job.save_trained(person, out, frozen)
    report.write(
        out, files=files, rank=settings.own.rank, trigger=frozen.trigger, **job.steps_of(person.metadata)
    )
    job.tell(out, files)


def finetune(
    file: Annotated[Path, typer.Argument(help="The adapter to start from, usually a prediction.")],
    photo: Annotated[
        list[Path], typer.Option("--photo", help="Photo of the person; repeat it.", parser=named_path)
    ],
    out: Annotated[Path, typer.Option("--out", help="The LoRA to write (.safetensors).")],
    form: Annotated[Literal["diffusers", "kohya"], typer.Option("--format")] = "diffusers",
    rank: Rank = None,
    steps: StepsOrAuto = None,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Relax an adapter, train it a few steps."""
    from hyperdreambooth.adapter import check_rank
    from hyperdreambooth.apps import job
    from hyperdreambooth.finetune.config import FinetuneConfig
    from hyperdreambooth.finetune.fast import finetune_adapter as run

    flags = {"rank": rank, "steps": steps, "base": base, "device": device}
    settings = job.resolve_tuned("finetune", FinetuneConfig, hypernet, config, sets, **flags)
    if dry_run:
        return settings.show()
    must_exist(file)
    job.check_file(out)
    report, shots = Report("finetune", settings.plain()), job.person(photo)
    with report.stage("load"):
        frozen = job.load(settings.place)
        adapter = job.open_adapter(file, frozen, hypernet)
        # captions use the trigger of the adapter's file
        frozen = frozen.with_words(adapter.trigger or frozen.trigger, frozen.class_word)
        check_rank(settings.own.rank, adapter.factors)
    with report.stage("finetune"):
        trained = run(frozen, adapter, shots, settings.own)
    trained.save(out, form, frozen.resolution)
    steps_taken = job.steps_of(trained.metadata)
    report.write(out, source=str(file), rank=trained.rank, trigger=trained.trigger, **steps_taken)
    typer.echo(str(out))


def preoptimize(
    photos: People,
    out: Annotated[Path, typer.Option("--out", help="The bank.")],
    steps: Steps = None,
    seed: Seed = None,
    base: BaseName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Train many people together into a bank."""
    from hyperdreambooth.apps import job
    from hyperdreambooth.preopt.bank_training import PreoptConfig
    from hyperdreambooth.preopt.bank_training import preoptimize as run

    settings = resolve(
        "preoptimize", PreoptConfig, config, sets, steps=steps, seed=seed, base=base, device=device
    )
    if dry_run:
        return settings.show()
    report = Report("preoptimize", settings.plain())
    with report.stage("load"):
        frozen = job.load(settings.place)
    with report.stage("train"):
        bank = run(frozen, photos, out, settings.own)
    report.write(out, identities=len(bank.identities), numbers=bank.layout.size)
    typer.echo(f"{out}: {len(bank.identities)} people")


def train(
    photos: People,
    out: Annotated[Path, typer.Option("--out", help="The hypernetwork's folder.")],
    bank: Annotated[
        Path | None, typer.Option("--bank", help="What preoptimize made.", show_default=False)
    ] = None,
    steps: Steps = None,
    seed: Seed = None,
    base: BaseName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Train the hypernetwork: photo to adapter.

    `--set learn_basis=true` learns the aux bases too, and needs no bank. A config's `[finetune]` table
    travels in the folder: the finetune's defaults for whoever uses it.
    """
    from hyperdreambooth.apps import job
    from hyperdreambooth.finetune.config import FinetuneConfig
    from hyperdreambooth.hypernet.config import HypernetConfig
    from hyperdreambooth.hypernet.train import train_hypernet

    settings = resolve(
        "train", HypernetConfig, config, sets, steps=steps, seed=seed, base=base, device=device
    )
    FinetuneConfig().over(settings.own.finetune)  # a mistake there would show after the training
    if dry_run:
        return settings.show()
    report = Report("train", settings.plain())
    with report.stage("load"):
        frozen = job.load(settings.place)
        sample, score = job.validation(frozen)
    with report.stage("train"):
        train_hypernet(frozen, photos, out, settings.own, bank, sample=sample, score=score)
    if job.is_main_process():
        report.write(out)
        typer.echo(str(out))
