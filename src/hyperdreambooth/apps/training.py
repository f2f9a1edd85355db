"""Commands that train: one person (dreambooth, finetune), many (preoptimize), the hypernetwork (train)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.adapters import LoraFile, LoraForm
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import (
    BankStore,
    Cluster,
    HypernetName,
    People,
    Photos,
    ShardOf,
    as_recommended,
    command,
    named_path,
    named_store,
    one_way,
)
from hyperdreambooth.storage import Store

if TYPE_CHECKING:
    from hyperdreambooth.apps.person_config import ScratchConfig
    from hyperdreambooth.apps.settings import Job
    from hyperdreambooth.finetune.config import FinetuneConfig
    from hyperdreambooth.hypernet.config import HypernetConfig
    from hyperdreambooth.preopt.config import PreoptConfig


@command(
    "hyperdreambooth.apps.person_config:ScratchConfig",
    "prompts", "method", "rank", "steps|auto", "seed",
)  # fmt: skip
def dreambooth(
    job: Job[ScratchConfig],
    photos: Photos,
    out: Annotated[
        Path, Option(help="The folder for the result, pictures and report.json."), Check(checks.run_folder)
    ],
) -> None:
    """Train one person from scratch.

    --method chooses what is trained: the numbers of a LiDB (lidb), an ordinary LoRA (lora), all weights of
    the base as in the DreamBooth paper (full), or the embedding of one word (textual-inversion).
    """
    from hyperdreambooth.apps.personalization import run_personalization
    from hyperdreambooth.faces.dataset import read_person

    run_personalization(job, read_person(photos), [], out)


@command(
    "hyperdreambooth.finetune.config:FinetuneConfig",
    "rank", "steps|auto", "seed", adjust=as_recommended,
)  # fmt: skip
def finetune(
    job: Job[FinetuneConfig],
    file: Annotated[
        Path, Argument(help="The adapter to start from, usually a prediction."), Check(checks.adapters)
    ],
    photo: Annotated[
        list[Path],
        Option(help="A photo of the person; may be repeated.", parser=named_path),
        Check(checks.person),
    ],
    out: LoraFile,
    form: LoraForm = "diffusers",
    hypernet: HypernetName = None,
) -> None:
    """Raise the rank of an adapter and train it for a few steps."""
    from hyperdreambooth.adapter import check_forms, check_rank
    from hyperdreambooth.apps.loading import load, open_adapter
    from hyperdreambooth.faces.dataset import read_person
    from hyperdreambooth.finetune.fast import finetune_adapter
    from hyperdreambooth.lora.formats.write import sites_of

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


@command("hyperdreambooth.preopt.config:PreoptConfig", "steps", "seed", adjust=one_way)
def preoptimize(
    job: Job[PreoptConfig],
    photos: People,
    out: Annotated[
        Store,
        Option(help="The bank's folder, or its URL in an object store.", parser=named_store, metavar="PLACE"),
        Check(checks.output_store),
    ],
    cluster: Cluster = None,
    shard: ShardOf = None,
) -> None:
    """Train the LiDBs of many people into a bank."""
    from hyperdreambooth.apps import elsewhere
    from hyperdreambooth.apps.loading import load
    from hyperdreambooth.cluster.shards import Shard, forget_shards
    from hyperdreambooth.preopt.bank_training import fill_bank

    with job.stage("load"):
        base = load((elsewhere.at_home(job) if cluster else job).base)
    if shard and (part := Shard.parse(shard)):
        people = elsewhere.preoptimize_shard(job, base, photos, out, part)
        echo(f"{out}: shard {part}, {people} people; merge when all shards are done")
        return
    if shard:
        elsewhere.check_preoptimized(job, base, photos, out)
    with job.stage("train"):
        hand_out = elsewhere.groups_on_ray(job, out, cluster) if cluster else None
        bank = fill_bank(base, photos, str(out), job.own, hand_out)
    forget_shards(out.here)
    job.report(out.here, identities=len(bank), numbers=bank.layout.size)
    echo(f"{out}: {len(bank)} people")


def _complete(job: Job[HypernetConfig], _own: Mapping[str, Any]) -> Job[HypernetConfig]:
    """Names the encoder, and checks `[finetune]`, whose mistakes would otherwise show after the training."""
    from hyperdreambooth.finetune.config import FinetuneConfig
    from hyperdreambooth.hypernet.encoder import encoder_of

    FinetuneConfig().over(job.own.finetune)
    encoder = job.own.encoder or encoder_of(job.base.base)
    return replace(job, own=job.own.model_copy(update={"encoder": encoder}))


@command("hyperdreambooth.hypernet.config:HypernetConfig", "steps", "seed", adjust=_complete)
def train(
    job: Job[HypernetConfig],
    photos: People,
    out: Annotated[Path, Option(help="The hypernetwork's folder."), Check(checks.output_folder)],
    bank: BankStore = None,
    cluster: Cluster = None,
) -> None:
    """Train the hypernetwork on photos of many people.

    `--set learn_basis=true` learns the aux bases too and needs no bank. The `[finetune]` table of the config
    is saved in the folder, as the defaults for finetuning what the hypernetwork predicts.
    """
    process = partial(_train, job, photos, out, bank)
    with job.stage("train"):
        if cluster:
            from hyperdreambooth.cluster.training import train_on_ray

            train_on_ray(process, out, cluster, job.base.device, job.own.batch)
        else:
            process()
    if os.environ.get("RANK", "0") == "0":  # the first process of `accelerate launch`
        job.report(out)
        echo(str(out))


def _train(job: Job[HypernetConfig], photos: Path, out: Path, bank: Store | None) -> None:
    """Loads a base and trains, alone or as one of several processes."""
    from hyperdreambooth.apps.loading import load, validation
    from hyperdreambooth.hypernet.train import train_hypernet

    with job.stage("load"):
        base = load(job.base)
        sample, score = validation(base)
    train_hypernet(base, photos, out, job.own, bank and str(bank), sample=sample, score=score)
