"""`hdb prepare`: photos to crops, with a report and a contact sheet of what was kept and what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperdreambooth.apps.options import ConfigFile, DryRun, Sets, resolve, show
from hyperdreambooth.apps.report import Report

if TYPE_CHECKING:
    from hyperdreambooth.faces.journal import Record

TOLD = 5  # dropped photos named on the terminal; the report names all


def prepare(
    photos: Annotated[
        str, typer.Argument(help="Folder, photo, *.tar shards, data set folder, or hf:NAME[:split].")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder of crops.")],
    already_cropped: Annotated[
        bool, typer.Option("--already-cropped", help="Look for no face: take the centre square.")
    ] = False,
    size: Annotated[
        int | None, typer.Option("--size", help="Pixels a side [512].", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes [all cores].", show_default=False)
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option("--detector", help="YuNet's ONNX file [fetched once].", show_default=False),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Photos to aligned crops of faces.

    Run it again to continue, or after photos were added. What is dropped, and why, stands in report.json and
    contact-sheet.png.
    """
    from hyperdreambooth.faces.config import PrepareConfig

    flags = {"already_cropped": already_cropped or None, "size": size, "detector": detector}
    settings = resolve("prepare", PrepareConfig, config, sets, **flags).own
    if dry_run:
        return show(settings.model_dump(mode="json"))
    from hyperdreambooth.faces.dataset import printable
    from hyperdreambooth.faces.prepare import prepare_folder

    report = Report("prepare", settings.model_dump(mode="json"))
    with report.stage("prepare"):
        records = prepare_folder(photos, out, settings, workers)
    with report.stage("sheet"):
        _draw(out, records)
    kept = [{"photo": one.photo, "crop": f"{one.name}.png"} for one in records if one.kept]
    dropped = [{"photo": one.photo, "reason": one.reason} for one in records if not one.kept]
    report.write(out, photos=printable(photos), counts=_counts(records), kept=kept, dropped=dropped)
    _tell(out, records)


def _counts(records: list[Record]) -> dict[str, int]:
    kept = [one for one in records if one.kept]
    people = {one.name.partition("/")[0] for one in kept}
    return {
        "photos": len(records),
        "kept": len(kept),
        "dropped": len(records) - len(kept),
        "people": len(people),
    }


def _draw(out: Path, records: list[Record]) -> None:
    from hyperdreambooth.apps.sheet import contact_sheet
    from hyperdreambooth.faces.dataset import SHEET
    from hyperdreambooth.files import whole_file

    with whole_file(out / SHEET) as part:
        contact_sheet(out, records).save(part, format="PNG")


def _tell(out: Path, records: list[Record]) -> None:
    """How many, and the first that were dropped.

    Raises:
        InputError: nothing was kept.
    """
    from hyperdreambooth.files import InputError

    dropped, counts = [one for one in records if not one.kept], _counts(records)
    if dropped and len(dropped) == len(records):
        reasons = dropped[0].reason
        raise InputError(
            f"{out}: none of {len(records)} photos was kept; the first: {reasons}; see report.json"
        )
    for one in dropped[:TOLD]:
        typer.echo(f"dropped    {one.photo}: {one.reason}")
    if len(dropped) > TOLD:
        typer.echo(f"dropped    {len(dropped) - TOLD} more; see {out / 'report.json'}")
    typer.echo(f"{out}: {counts['kept']} crops of {counts['people']} people, {counts['dropped']} dropped")
