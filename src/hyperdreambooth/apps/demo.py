"""`hdb demo`: the whole job on the embedded avatars, for a person that no training has seen."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperdreambooth.apps.options import (
    BaseName,
    ConfigFile,
    Device,
    DryRun,
    HypernetName,
    Seed,
    Sets,
    named_path,
)

if TYPE_CHECKING:
    from PIL import Image

OTHERS = 6  # more photos of the person, for scores only


def demo(
    photo: Annotated[
        Path | None,
        typer.Option(
            "--photo", help="Your own photo [a held-out avatar's].", show_default=False, parser=named_path
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for adapters, picture and report.json.")] = Path(
        "demo"
    ),
    seed: Seed = None,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """The whole job on an avatar, offline.

    Photo to prediction to finetuned LoRA to one picture of it all.
    """
    began = time.perf_counter()
    from hyperdreambooth.apps import job, show

    flags = {"seed": seed, "base": base, "device": device}
    settings = job.resolve_tuned("demo", show.ShowConfig, hypernet, config, sets, **flags)
    if dry_run:
        return settings.show()
    if photo is not None:
        show.show("demo", settings, job.person([photo]), [], out, hypernet, began)
        return
    with tempfile.TemporaryDirectory() as folder:
        reference, others = held_out(settings.own.seed, Path(folder))
        show.show("demo", settings, job.person([reference]), others, out, hypernet, began)


def held_out(seed: int, folder: Path) -> tuple[Path, list[Image.Image]]:
    """A test avatar's reference photo, as a file in `folder`, and further photos of the same avatar.

    Beside the photo lies what it shows, as a user would write it: what a caption names (a smile, a beach) is
    not taken for a part of the person.
    """
    from hyperdreambooth.avatars.draw.people import SPLITS
    from hyperdreambooth.avatars.folder import photo
    from hyperdreambooth.files import InputError

    if not 0 <= seed < len(SPLITS["test"]):
        raise InputError(f"seed: expected 0 to {len(SPLITS['test']) - 1}, got {seed}")
    person = SPLITS["test"].start + seed
    reference = folder / f"avatar-{person}.png"
    image, words = photo(person, 0)
    image.save(reference)
    reference.with_suffix(".txt").write_text(words, encoding="utf-8")
    return reference, [photo(person, number)[0] for number in range(1, OTHERS + 1)]
