"""`hdb prepare`: photos to crops, with a report and a contact sheet of what was kept and what was dropped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import Cluster, ShardOf, Workers, command, one_way

if TYPE_CHECKING:
    from hyperdreambooth.apps.settings import Job
    from hyperdreambooth.faces.config import PrepareConfig
    from hyperdreambooth.faces.journal import Record

NAMED = 5  # lines of a kind on the terminal; the report has all


@command(
    "hyperdreambooth.faces.config:PrepareConfig",
    "already_cropped", "size", "detector", "person", "several",
    adjust=one_way, on_base=False,
)  # fmt: skip
def prepare(
    job: Job[PrepareConfig],
    photos: Annotated[
        str,
        Argument(help="A folder, a photo, a .tar shard or a folder of them, a data set, or hf:NAME[:split]."),
        Check(checks.source),
    ],
    out: Annotated[Path, Option(help="The folder for the crops."), Check(checks.run_folder)],
    workers: Workers = None,
    cluster: Cluster = None,
    shard: ShardOf = None,
) -> None:
    """Crop and align the faces of photos.

    Run it again to continue, or after photos were added. report.json and contact-sheet.png show which photos
    were dropped, and why, and which of the others to look at.
    """
    from hyperdreambooth.apps import crops_elsewhere
    from hyperdreambooth.apps.sheet import contact_sheet
    from hyperdreambooth.cluster.shards import Shard, forget_shards
    from hyperdreambooth.faces.dataset import SHEET
    from hyperdreambooth.faces.notes import printable
    from hyperdreambooth.faces.prepare import prepare_folder
    from hyperdreambooth.faces.sources import not_used
    from hyperdreambooth.files import InputError, whole_file

    if shard and (part := Shard.parse(shard)):
        count = crops_elsewhere.prepare_shard(job, photos, out, part, workers)
        echo(f"{out}: shard {part}, {count} photos; merge when all shards are done")
        return
    if shard:
        crops_elsewhere.collect_prepared(job, photos, out)
    hand_out = crops_elsewhere.photos_on_ray(cluster) if cluster else None
    with job.stage("prepare"):
        records = prepare_folder(photos, out, job.own, workers, hand_out=hand_out)
    forget_shards(out)
    kept = [one for one in records if one.kept]
    dropped = [{"photo": one.photo, "reason": one.reason} for one in records if not one.kept]
    with job.stage("check"):
        check = _check(out, kept, job.own)
    with job.stage("sheet"), whole_file(out / SHEET) as part:
        contact_sheet(out, records, check).save(part, format="PNG")
    people, given = {one.person for one in kept}, len({one.photo for one in records})
    counts = {"photos": given, "kept": len(kept), "dropped": len(dropped), "people": len(people)}
    crops, ignored = [_entry(one) for one in kept], [one._asdict() for one in not_used(photos)]
    named = {"kept": crops, "dropped": dropped, "ignored": ignored}
    job.report(out, photos=printable(photos), counts=counts, **named, check=check)
    if dropped and not kept:
        reason = dropped[0]["reason"]
        advice = "see report.json; other settings need another --out"
        raise InputError(f"{out}: none of {given} photos was kept; the first: {reason}; {advice}")
    _print(out, "dropped", [f"{one['photo']}: {one['reason']}" for one in dropped])
    _print(out, "ignored", [f"{one['name']}: {one['reason']}" for one in ignored])
    _print(out, "check", _findings(check))
    echo(f"{out}: {_count(kept, 'crop')} of {_count(people, 'person', 'people')}, {len(dropped)} dropped")


def _entry(one: Record) -> dict[str, Any]:
    """Returns what the report says about a crop; what is as it should be is left out."""
    entry: dict[str, Any] = {"photo": one.photo, "crop": f"{one.name}.png"}
    if one.faces > 1:
        entry["faces"] = one.faces
    if one.corners is not None:
        entry["padded"] = round(one.padded, 3)
    return entry


def _check(out: Path, kept: Sequence[Record], config: PrepareConfig) -> dict[str, Any]:
    """Returns the report's findings: copies of a photo, reference photos, strangers where faces can be told.

    `encoder` names the face encoder, or is null, and `not_checked` says why nobody looked for strangers.
    """
    from hyperdreambooth.evaluate.face_encoders import face_encoder
    from hyperdreambooth.faces import check
    from hyperdreambooth.files import InputError

    people: dict[str, list[Record]] = {}
    for one in kept:
        people.setdefault(one.person, []).append(one)
    several = {person: crops for person, crops in people.items() if len(crops) > 1}
    found, encoder, why = list[check.Stranger](), None, ""
    if config.check == "off" or not several:
        why = "switched off" if several else "nobody has two crops"
    else:
        try:
            encoder = face_encoder("auto", check.only_face)
        except InputError as error:
            why = str(error)
    if encoder is not None:
        vectors = check.vectors_of(out, kept, encoder, out / ".faces" / encoder.name)
        scale = encoder.calibration.stranger, encoder.calibration.same
        found = check.strangers(
            {p: [one.name for one in crops] for p, crops in people.items()}, vectors, scale
        )
    odd = [one.crop for one in found]
    return {
        "encoder": encoder and encoder.name,
        "licence": encoder and encoder.licence,
        "not_checked": why or None,
        "strangers": [{"crop": one.crop, "likeness": one.likeness, "like": one.like} for one in found],
        "duplicates": check.duplicates(kept),
        "references": {person: check.reference(crops, odd) for person, crops in several.items()},
    }


def _findings(check: dict[str, Any]) -> list[str]:
    """Returns a line for each finding."""
    lines: list[str] = []
    for one in check["strangers"]:
        like = f", like {one['like']}" if one["like"] else ""
        lines.append(f"{one['crop']}: perhaps another person than in the rest of the folder{like}")
    lines += [f"{', '.join(names)}: the same photo" for names in check["duplicates"]]
    if check["references"] and check["not_checked"] not in (None, "switched off"):
        lines.append(f"other people's photos were not looked for: {check['not_checked']}")
    return lines


def _print(out: Path, kind: str, lines: Sequence[str]) -> None:
    for line in lines[:NAMED]:
        echo(f"{kind:<10} {line}")
    if len(lines) > NAMED:
        echo(f"{kind:<10} {len(lines) - NAMED} more; see {out / 'report.json'}")


def _count(things: Sequence[Any] | set[Any], one: str, many: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else many or f'{one}s'}"
