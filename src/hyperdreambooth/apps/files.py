"""Commands that make adapter files of others: relax, export, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hyperdreambooth.apps.options import (
    BaseName,
    ConfigFile,
    Device,
    DryRun,
    HypernetName,
    Nothing,
    Rank,
    Relaxation,
    Seed,
    Sets,
    Weights,
    must_exist,
    resolve,
)
from hyperdreambooth.apps.report import Report, check_report

if TYPE_CHECKING:
    from hyperdreambooth.adapter import Adapter
    from hyperdreambooth.base.load import Base


def relax(
    file: Annotated[Path, typer.Argument(help="A LiDB or a LoRA.")],
    out: Annotated[Path, typer.Option("--out", help="The LoRA to write (.safetensors).")],
    rank: Rank = None,
    form: Annotated[Literal["diffusers", "kohya"], typer.Option("--format")] = "diffusers",
    seed: Seed = None,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Adapter to LoRA of a higher rank.

    The same at step 0, with room to be finetuned.
    """
    settings = resolve("relax", Relaxation, config, sets, rank=rank, seed=seed, base=base, device=device)
    if dry_run:
        return settings.show()
    must_exist(file)
    from hyperdreambooth.apps import job

    job.check_file(out)
    report = Report("relax", settings.plain())
    with report.stage("load"):
        frozen = job.load(settings.place)
        adapter = job.open_adapter(file, frozen, hypernet)
    with report.stage("relax"):
        relaxed = adapter.relax(settings.own.rank, settings.own.seed)
    relaxed.save(out, form, frozen.resolution)
    report.write(out, source=str(file), rank=relaxed.rank, trigger=relaxed.trigger)
    typer.echo(str(out))


def export(
    source: Annotated[Path, typer.Argument(help="A bank, or an adapter file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")],
    identity: Annotated[
        str | None, typer.Option("--identity", help="Who, of a bank.", show_default=False)
    ] = None,
    form: Annotated[
        Literal["diffusers", "kohya", "lidb", "merged", "all"],
        typer.Option("--format", help="merged: a whole pipeline; all: each file the source has."),
    ] = "all",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Number format of the files.")
    ] = "float32",
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Bank or adapter to standard LoRA files.

    Or to a whole pipeline, for tools that know no adapters.
    """
    settings = resolve("export", Nothing, config, sets, base=base, device=device)
    if dry_run:
        return settings.show()
    must_exist(source)
    from hyperdreambooth.apps import job
    from hyperdreambooth.files import InputError, check_writable

    check_writable(out)
    check_report(out, "export")
    if (out / "merged").exists() and not (out / "report.json").is_file():
        raise InputError(f"out {out}: holds a pipeline that no export has made; pass another --out")
    report = Report("export", settings.plain())
    with report.stage("load"):
        frozen = job.load(settings.place)
        adapter = (
            _of_bank(source, identity, frozen)
            if source.is_dir()
            else job.open_adapter(source, frozen, hypernet)
        )
    with report.stage("write"):
        if form == "merged":
            files = job.save_pipeline(adapter, out, frozen, dtype)
        else:
            files = job.save_forms(adapter, out, frozen.resolution, form, dtype)
    facts = {"rank": adapter.rank, "trigger": adapter.trigger, "identity": identity}
    report.write(out, source=str(source), files=files, **facts)
    job.tell(out, files)


def _of_bank(folder: Path, identity: str | None, base: Base) -> Adapter:
    """One identity of a bank, checked against the base."""
    from hyperdreambooth.adapter import Adapter
    from hyperdreambooth.files import InputError
    from hyperdreambooth.lidb.bank import Bank
    from hyperdreambooth.lidb.basis import seed_of, seeded_basis
    from hyperdreambooth.lidb.file import check_fits

    bank = Bank.open(folder)
    if identity is None:
        known = ", ".join(bank.identities[:5])
        raise InputError(f"{folder}: a bank of {len(bank)} people ({known}, …); name one with --identity")
    layout, seed = bank.layout, seed_of(bank.manifest["basis_source"])
    if seed is None:
        source = bank.manifest["basis_source"]
        raise InputError(
            f"{folder}: expected a basis seed:N, its manifest says {source}; make the bank again"
        )
    basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, seed)
    lidb = bank.lidb(identity, basis)
    check_fits(lidb, base.fingerprint, base.sites, basis, folder)
    return Adapter.from_lidb(lidb, basis)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Adapter files: LiDB or LoRA, ours or others'.")],
    out: Annotated[Path, typer.Option("--out", help="The LoRA to write (.safetensors).")],
    weight: Weights = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of the result [exact: the sum].", show_default=False)
    ] = None,
    form: Annotated[Literal["diffusers", "kohya"], typer.Option("--format")] = "diffusers",
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Several adapters as one LoRA.

    Exact; with a rank, the nearest of that rank, and how near.
    """
    settings = resolve("merge", Nothing, config, sets, base=base, device=device)
    if dry_run:
        return settings.show()
    must_exist(*files)
    from hyperdreambooth.adapter import merge as add
    from hyperdreambooth.apps import job

    job.check_file(out)
    report = Report("merge", settings.plain())
    with report.stage("load"):
        frozen = job.load(settings.place)
        worn = job.open_weighted(files, weight or [], frozen, hypernet)
    with report.stage("merge"):
        merged, error = add(worn, rank)
    merged.save(out, form, frozen.resolution)
    facts = {"weights": [own for _, own in worn], "rank": merged.rank, "relative_error": error}
    report.write(out, sources=[str(file) for file in files], trigger=merged.trigger, **facts)
    typer.echo(f"{out}: rank {merged.rank}, relative error {error:.2g}")
