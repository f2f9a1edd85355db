"""`hdb avatars render|build`: the embedded world, as photo folders and as models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.apps.options import ConfigFile, Device, DryRun, Seed, Sets, resolve_alone, show
from hyperdreambooth.apps.report import Report
from hyperdreambooth.avatars.build import STAGES

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


class RenderConfig(BaseModel):
    """The config of `avatars render`."""

    model_config = ConfigDict(extra="forbid")

    split: str = "train"
    identities: int = Field(100, ge=1)
    photos: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)


@app.command()
def render(
    out: Annotated[Path, typer.Option("--out", help="The photo folder.")],
    split: Annotated[
        str | None, typer.Option("--split", help="base, train, val or test.", show_default=False)
    ] = None,
    identities: Annotated[
        int | None, typer.Option("--identities", help="How many.", show_default=False)
    ] = None,
    photos: Annotated[int | None, typer.Option("--photos", help="Of each.", show_default=False)] = None,
    seed: Seed = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes [all cores].", show_default=False),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Draw avatars into an ordinary photo folder with captions."""
    flags = {"split": split, "identities": identities, "photos": photos, "seed": seed}
    settings = resolve_alone(RenderConfig, config, sets, **flags)
    if dry_run:
        return show(settings.model_dump())
    from hyperdreambooth.avatars.folder import render_folder

    report = Report("avatars render", settings.model_dump())
    with report.stage("render"):
        names = render_folder(out, **settings.model_dump(), workers=workers)
    report.write(out)
    typer.echo(f"{out}: {len(names)} people, {settings.photos} photos each")


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", help="Working folder: pictures, runs, finished models.")],
    stage: Annotated[str, typer.Option("--stage", help=f"{', '.join(STAGES)} or all.")] = "all",
    pack: Annotated[
        Path | None, typer.Option("--pack", help="Also copy what ships into this folder.", show_default=False)
    ] = None,
    device: Device = "auto",
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:
    """Train the avatars' own base, scorers and encoder from seeds; run again to continue."""
    from hyperdreambooth.avatars.build import stages as world
    from hyperdreambooth.base.load import pick_device

    settings = resolve_alone(world.BuildConfig, config, sets)
    if dry_run:
        return show(settings.model_dump(mode="json"))
    report = Report("avatars build", settings.model_dump(mode="json"))
    with report.stage(stage):
        figures = world.build(stage, out, settings, str(pick_device(device or "auto")))
    if pack is not None:
        world.pack(out, pack)
    report.write(out, figures=figures)
    typer.echo(str(pack or out))
