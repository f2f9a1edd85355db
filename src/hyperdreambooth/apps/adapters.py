"""Commands that make adapter files from others: relax, export, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import HypernetName, Weights, command, named_store
from hyperdreambooth.storage import Store

if TYPE_CHECKING:
    from hyperdreambooth.adapter import Adapter
    from hyperdreambooth.apps.settings import Job, NoConfig, RelaxConfig
    from hyperdreambooth.base.load import Base

LoraFile = Annotated[Path, Option(help="The LoRA to write (.safetensors)."), Check(checks.output_file)]
LoraForm = Annotated[Literal["diffusers", "kohya"], Option("--format", help="The layout of the file's keys.")]


@command("hyperdreambooth.apps.settings:RelaxConfig", "rank", "seed")
def relax(
    job: Job[RelaxConfig],
    file: Annotated[Path, Argument(help="A LiDB or a LoRA."), Check(checks.adapters)],
    out: LoraFile,
    form: LoraForm = "diffusers",
    hypernet: HypernetName = None,
) -> None:
    """Raise the rank of an adapter.

    The LoRA it writes changes the base exactly as the adapter does, and has room for the finetune.
    """
    from hyperdreambooth.apps.loading import load, open_adapter

    with job.stage("load"):
        base = load(job.base)
        adapter = open_adapter(file, base, hypernet)
    with job.stage("relax"):
        relaxed = adapter.relax(job.own.rank, job.own.seed)
    relaxed.save(out, form)
    job.report(out, source=str(file), rank=relaxed.rank, trigger=relaxed.trigger)
    echo(str(out))


@command("hyperdreambooth.apps.settings:NoConfig")
def export(
    job: Job[NoConfig],
    source: Annotated[
        Store,
        Argument(help="A bank or an adapter file.", parser=named_store),
        Check(checks.adapter_or_bank),
    ],
    out: Annotated[Path, Option(help="The folder for the files."), checks.result_of("export")],
    identity: Annotated[str | None, Option(help="The person to export from a bank.")] = None,
    form: Annotated[
        Literal["diffusers", "kohya", "original", "lidb", "merged", "all"],
        Option("--format", help="merged writes a whole pipeline; all writes diffusers, kohya and lidb."),
    ] = "all",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Option(help="The number format of the files.")
    ] = "float32",
    hypernet: HypernetName = None,
) -> None:
    """Write a bank's person or an adapter as standard LoRA files.

    Or as a whole pipeline, for tools that cannot load adapters.
    """
    from hyperdreambooth.apps.loading import load, open_adapter
    from hyperdreambooth.apps.saving import print_files, save_forms, save_pipeline
    from hyperdreambooth.files import InputError

    if (out / "merged").exists() and not (out / "report.json").is_file():
        raise InputError(
            f"out {out}: expected a new folder or a result of export, found a pipeline from elsewhere; "
            "pass another --out"
        )
    with job.stage("load"):
        base = load(job.base, exact=form == "merged")
        if source.local is None or source.local.is_dir():
            adapter = _from_bank(source, identity, base)
        else:
            adapter = open_adapter(source.local, base, hypernet)
    with job.stage("write"):
        if form == "merged":
            files = save_pipeline(adapter, out, base, dtype)
        else:
            files = save_forms(adapter, out, form, dtype)
    person = {"rank": adapter.rank, "trigger": adapter.trigger, "identity": identity}
    job.report(out, source=str(source), files=files, **person)
    print_files(out, files)


def _from_bank(folder: Store, identity: str | None, base: Base) -> Adapter:
    """Takes one identity out of a bank and checks it against the base."""
    from hyperdreambooth.adapter import Adapter, family_name
    from hyperdreambooth.files import InputError
    from hyperdreambooth.lidb.bank import Bank
    from hyperdreambooth.lidb.basis import seed_of, seeded_basis
    from hyperdreambooth.lidb.file import check_fits

    bank = Bank.open(folder)
    if identity is None:
        known = ", ".join(bank.identities[:5])
        raise InputError(f"{folder}: a bank of {len(bank)} people ({known}, …); name one with --identity")
    layout, source = bank.layout, bank.manifest["basis_source"]
    seed = seed_of(source)
    if seed is None:
        raise InputError(f"{folder}: expected seeded aux bases (seed:N), got {source}; make the bank again")
    basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, seed)
    lidb = bank.lidb(identity, basis)
    check_fits(lidb, base.fingerprint, base.sites, basis, str(folder))
    return Adapter.from_lidb(lidb, basis, family_name(base))


@command("hyperdreambooth.apps.settings:NoConfig")
def merge(
    job: Job[NoConfig],
    files: Annotated[
        list[Path], Argument(help="Adapter files of any origin: LiDBs or LoRAs."), Check(checks.adapters)
    ],
    out: LoraFile,
    weight: Weights = None,
    rank: Annotated[
        int | None, Option(help="The rank of the result [the sum of the ranks, which is exact].")
    ] = None,
    form: LoraForm = "diffusers",
    hypernet: HypernetName = None,
) -> None:
    """Add adapters up into one LoRA.

    The result is exact. With --rank it is the nearest LoRA of that rank, and its error is printed.
    """
    from hyperdreambooth.apps.loading import load, open_sum

    with job.stage("load"):
        base = load(job.base)
        merged, error = open_sum(files, weight or [], base, hypernet), 0.0
        assert merged is not None  # typer wants one file at least
    if rank is not None:
        with job.stage("truncate"):
            merged, error = merged.truncate(rank)
    merged.save(out, form)
    result = {"weights": weight or [1.0] * len(files), "rank": merged.rank, "relative_error": error}
    job.report(out, sources=[str(file) for file in files], trigger=merged.trigger, **result)
    echo(f"{out}: rank {merged.rank}, relative error {error:.2g}")
