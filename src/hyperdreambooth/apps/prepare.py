"""`hdb prepare`: photos to crops, with a report and a contact sheet of what was kept and what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import Workers, command
from hyperdreambooth.apps.settings import Job

if TYPE_CHECKING:
    from hyperdreambooth.faces.config import PrepareConfig

NAMED = 5  # dropped photos that are named on the terminal; the report names all


@command("hyperdreambooth.faces.config:PrepareConfig", "already_cropped", "size", "detector", on_base=False)
def prepare(
    job: Job[PrepareConfig],
    photos: Annotated[
        str,
        Argument(help="A folder, a photo, *.tar shards, a data set folder, or hf:NAME[:split]."),
        Check(checks.source),
    ],
    out: Annotated[Path, Option(help="The folder for the crops."), Check(checks.run_folder)],
    workers: Workers = None,
) -> None:
    """Crop and align the faces of photos.

    Run it again to continue, or after photos were added. report.json and contact-sheet.png show which photos
    were dropped, and why.
    """
    from hyperdreambooth.apps.sheet import contact_sheet
    from hyperdreambooth.faces.dataset import SHEET, printable
    from hyperdreambooth.faces.prepare import prepare_folder
    from hyperdreambooth.files import InputError, whole_file

    with job.stage("prepare"):
        records = prepare_folder(photos, out, job.own, workers)
    with job.stage("sheet"), whole_file(out / SHEET) as part:
        contact_sheet(out, records).save(part, format="PNG")
    kept = [{"photo": one.photo, "crop": f"{one.name}.png"} for one in records if one.kept]
    dropped = [{"photo": one.photo, "reason": one.reason} for one in records if not one.kept]
    people = {one.name.partition("/")[0] for one in records if one.kept}
    counts = {"photos": len(records), "kept": len(kept), "dropped": len(dropped), "people": len(people)}
    job.report(out, photos=printable(photos), counts=counts, kept=kept, dropped=dropped)
    if dropped and not kept:
        reason = dropped[0]["reason"]
        raise InputError(
            f"{out}: none of {len(records)} photos was kept; the first: {reason}; see report.json"
        )
    for one in dropped[:NAMED]:
        echo(f"dropped    {one['photo']}: {one['reason']}")
    if len(dropped) > NAMED:
        echo(f"dropped    {len(dropped) - NAMED} more; see {out / 'report.json'}")
    echo(f"{out}: {len(kept)} crops of {len(people)} people, {len(dropped)} dropped")
