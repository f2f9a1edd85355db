"""`hdb avatars render|build`: the embedded world, as photo folders and as models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import Device, Workers, command

if TYPE_CHECKING:
    from hyperdreambooth.apps.settings import Job, RenderConfig
    from hyperdreambooth.avatars.build.stages import BuildConfig

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
@command(
    "hyperdreambooth.apps.settings:RenderConfig",
    "split", "identities", "photos", "seed", name="avatars render", on_base=False,
)  # fmt: skip
def render(
    job: Job[RenderConfig],
    out: Annotated[Path, Option(help="The photo folder."), Check(checks.output_folder)],
    workers: Workers = None,
) -> None:
    """Draw avatars into a photo folder with captions."""
    from hyperdreambooth.avatars.folder import render_folder

    own = job.own
    with job.stage("render"):
        names = render_folder(out, own.split, own.identities, own.photos, own.seed, workers)
    job.report(out)
    echo(f"{out}: {len(names)} people, {own.photos} photos each")


@app.command()
@command("hyperdreambooth.avatars.build.stages:BuildConfig", name="avatars build", on_base=False)
def build(
    job: Job[BuildConfig],
    out: Annotated[
        Path,
        Option(help="The working folder for photos, runs and finished models."),
        Check(checks.output_folder),
    ],
    stage: Annotated[
        str, Option(help="vae, wide, encoder, base, shapes, decoder, scorers, unlabelled or all.")
    ] = "all",
    pack: Annotated[
        Path | None, Option(help="Also copy the models that are shipped into this folder.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the avatars' base, scorers and encoder from seeds; run it again to continue."""
    from hyperdreambooth.avatars.build import stages
    from hyperdreambooth.base.device import pick_device

    with job.stage(stage):
        figures = stages.build(stage, out, job.own, str(pick_device(device or "auto")))
    if pack is not None:
        stages.pack(out, pack)
    job.report(out, figures=figures)
    echo(str(pack or out))
