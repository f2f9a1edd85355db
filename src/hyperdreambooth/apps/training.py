"""Commands that train: one person (dreambooth, finetune), many (preoptimize), the hypernetwork (train)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from hyperdreambooth.apps.adapters import LoraFile, LoraForm
from hyperdreambooth.apps.options import (
    HypernetName,
    People,
    Photos,
    as_recommended,
    command,
    must_exist,
    named_path,
)
from hyperdreambooth.apps.settings import Job

if TYPE_CHECKING:
    from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
    from hyperdreambooth.hypernet.config import HypernetConfig
    from hyperdreambooth.preopt.bank_training import PreoptConfig


@command("hyperdreambooth.finetune.config:DreamboothConfig", "method", "rank", "steps|auto", "seed")
def dreambooth(
    job: Job[DreamboothConfig],
    photos: Photos,
    out: Annotated[Path, Option(help="The run folder, which will hold the result.")],
) -> None:
    """Train one person from scratch.

    --method chooses what is trained: the numbers of a LiDB (lidb), an ordinary LoRA (lora), all weights of
    the base as in the DreamBooth paper (full), or the embedding of one word (textual-inversion).
    """
    from hyperdreambooth.adapter import check_forms
    from hyperdreambooth.apps.loading import load
    from hyperdreambooth.apps.saving import print_files, save_trained
    from hyperdreambooth.faces.dataset import read_person
    from hyperdreambooth.finetune.dreambooth import dreambooth as run
    from hyperdreambooth.runs import check_run

    check_run(out)
    person = read_person(photos)
    with job.stage("load"):
        base = load(job.base)
    if job.own.method in ("lidb", "lora"):
        check_forms(base, base.sites)
    with job.stage("train"):
        trained = run(base, person, out, job.own)
    files = save_trained(trained, out, base)
    entries = {"files": files, "rank": job.own.rank, "trigger": base.trigger}
    job.report(out, **entries, **report_steps(trained.metadata))
    print_files(out, files)


@command("hyperdreambooth.finetune.config:FinetuneConfig", "rank", "steps|auto", adjust=as_recommended)
def finetune(
    job: Job[FinetuneConfig],
    file: Annotated[Path, Argument(help="The adapter to start from, usually a prediction.")],
    photo: Annotated[list[Path], Option(help="A photo of the person; may be repeated.", parser=named_path)],
    out: LoraFile,
    form: LoraForm = "diffusers",
    hypernet: HypernetName = None,
) -> None:
    """Raise the rank of an adapter and train it for a few steps."""
    must_exist(file)
    from hyperdreambooth.adapter import check_forms, check_rank
    from hyperdreambooth.apps.loading import load, open_adapter
    from hyperdreambooth.apps.saving import check_file
    from hyperdreambooth.faces.dataset import read_person
    from hyperdreambooth.finetune.fast import finetune_adapter
    from hyperdreambooth.lora.formats.write import sites_of

    check_file(out)
    person = read_person(photo)
    with job.stage("load"):
        base = load(job.base)
        adapter = open_adapter(file, base, hypernet)
        # captions use the trigger of the adapter's file
        base = base.with_words(adapter.trigger or base.trigger, base.class_word)
        check_rank(job.own.rank, adapter.factors)
    check_forms(base, sites_of(adapter.factors), [form])
    with job.stage("finetune"):
        trained = finetune_adapter(base, adapter, person, job.own)
    trained.save(out, form)
    entries = {"source": str(file), "rank": trained.rank, "trigger": trained.trigger}
    job.report(out, **entries, **report_steps(trained.metadata))
    echo(str(out))


def report_steps(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the report's `steps`, and `stopped` if the training ended by itself; prints the latter."""
    entries: dict[str, Any] = {"steps": int(metadata.get("steps", 0))}
    if "stopped" in metadata:
        entries["stopped"] = metadata["stopped"]
        echo(f"{'steps':12} {entries['steps']}: {entries['stopped']}")
    return entries


@command("hyperdreambooth.preopt.bank_training:PreoptConfig", "steps", "seed")
def preoptimize(
    job: Job[PreoptConfig], photos: People, out: Annotated[Path, Option(help="The bank's folder.")]
) -> None:
    """Train the LiDBs of many people into a bank."""
    from hyperdreambooth.apps.loading import load
    from hyperdreambooth.preopt.bank_training import preoptimize as run

    with job.stage("load"):
        base = load(job.base)
    with job.stage("train"):
        bank = run(base, photos, out, job.own)
    job.report(out, identities=len(bank.identities), numbers=bank.layout.size)
    echo(f"{out}: {len(bank.identities)} people")


def _check_finetune(job: Job[HypernetConfig], _own: Mapping[str, Any]) -> Job[HypernetConfig]:
    """Checks the `[finetune]` table, whose mistakes would otherwise show after the training."""
    from hyperdreambooth.finetune.config import FinetuneConfig

    FinetuneConfig().over(job.own.finetune)
    return job


@command("hyperdreambooth.hypernet.config:HypernetConfig", "steps", "seed", adjust=_check_finetune)
def train(
    job: Job[HypernetConfig],
    photos: People,
    out: Annotated[Path, Option(help="The hypernetwork's folder.")],
    bank: Annotated[Path | None, Option(help="The bank that preoptimize made.")] = None,
) -> None:
    """Train the hypernetwork on photos of many people.

    `--set learn_basis=true` learns the aux bases too and needs no bank. The `[finetune]` table of the config
    is saved in the folder, as the defaults for finetuning what the hypernetwork predicts.
    """
    from hyperdreambooth.apps.loading import load, validation
    from hyperdreambooth.hypernet.train import train_hypernet

    with job.stage("load"):
        base = load(job.base)
        sample, score = validation(base)
    with job.stage("train"):
        train_hypernet(base, photos, out, job.own, bank, sample=sample, score=score)
    if os.environ.get("RANK", "0") == "0":  # the first process of `accelerate launch`
        job.report(out)
        echo(str(out))
