"""`hdb evaluate`: methods as rows, people × prompts × seeds, scores with intervals, plots, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperdreambooth.apps.options import BaseName, Device, DryRun, HypernetName, Resolved, Sets, resolve
from hyperdreambooth.apps.report import Report, check_report

if TYPE_CHECKING:
    from hyperdreambooth.base.load import Base
    from hyperdreambooth.evaluate.config import EvaluateConfig
    from hyperdreambooth.evaluate.methods import Makers
    from hyperdreambooth.evaluate.protocol import Protocol, Row
    from hyperdreambooth.faces.dataset import Photo

PHOTOS = 8  # of each person who is rendered: one for the methods, one for the bound, six to judge by
FOR_A_FILE = ("another-photo", "somebody-else", "base", "adapter")


def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder for pictures, report.json, report.html, plots.")],
    photos: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of photos, one sub-folder a person [the embedded base: people rendered for it].",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="Judge this file instead of the methods.", show_default=False),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option("--identity", help="Whose it is: a sub-folder of PHOTOS.", show_default=False),
    ] = None,
    identities: Annotated[
        int | None, typer.Option("--identities", help="How many people.", show_default=False)
    ] = None,
    base: BaseName = None,
    hypernet: HypernetName = None,
    device: Device = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "--preset", show_default=False,
            help="TOML, YAML or JSON file, or a preset: avatars-small, avatars, paper.",
        ),
    ] = None,
    sets: Sets = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """The paper's experiment: methods side by side.

    Of each person the first photo is given, the last is a bound, those between judge. Without PHOTOS people
    that no training has seen are rendered into OUT/photos, if the base is the embedded one. Run it again to
    continue, or with more people, prompts, seeds or rows (--set 'rows=["base", "hyperdreambooth@20"]') to add
    to what is there.
    """
    from hyperdreambooth.evaluate.config import EvaluateConfig, methods_of
    from hyperdreambooth.files import check_apart, check_writable

    settings = resolve(
        "evaluate", EvaluateConfig, config, sets, identities=identities, base=base, device=device
    )
    if adapter is not None:
        settings = _for_a_file(settings, adapter)
    methods_of(settings.own)
    if dry_run:
        return settings.show()
    check_writable(out)
    check_report(out, "evaluate")
    if photos is not None:
        check_apart(out, photos)
    report = Report("evaluate", settings.plain())
    if photos is None:
        with report.stage("render"):
            photos = _rendered(settings, out, adapter)
    with report.stage("load"):
        people = _people(photos, identity, adapter is not None)
        protocol = _protocol(settings, people, out, adapter, hypernet)
    _run(protocol, report, out, photos, adapter)


def _for_a_file(settings: Resolved[EvaluateConfig], adapter: Path) -> Resolved[EvaluateConfig]:
    """One person, and rows without training.

    Raises:
        InputError: there is no such file; said before anything is loaded.
    """
    from hyperdreambooth.files import InputError

    if not adapter.exists():
        raise InputError(f"{adapter}: no such file")
    rows = settings.own.rows if "adapter" in settings.own.rows else FOR_A_FILE
    return Resolved(settings.place, settings.own.model_copy(update={"rows": rows, "identities": 1}))


def _rendered(settings: Resolved[EvaluateConfig], out: Path, adapter: Path | None) -> Path:
    """Photos of avatars that no training has seen, as many people as the config asks for.

    Raises:
        InputError: an adapter, which is of somebody in particular, or a base that knows other people.
    """
    from hyperdreambooth.avatars.folder import render_folder
    from hyperdreambooth.base.load import is_embedded
    from hyperdreambooth.files import InputError

    if adapter is not None or not is_embedded(settings.place.base):
        raise InputError(
            "PHOTOS: expected a folder of photos, one sub-folder a person, got none; only methods of the "
            "embedded base are judged without"
        )
    render_folder(out / "photos", "test", settings.own.identities, PHOTOS)
    return out / "photos"


def _people(folder: Path, identity: str | None, alone: bool) -> Mapping[str, Sequence[Photo]]:
    """Everybody of the folder, the named person first; a folder of nothing but photos may be one person's.

    Raises:
        InputError: no photo, no such person, or an adapter and nobody named among several people.
    """
    from hyperdreambooth.faces.dataset import read_faces, read_person
    from hyperdreambooth.files import InputError

    found = read_faces(folder)
    flat = all(photo.path.parent == folder for photos in found.values() for photo in photos)
    if alone and identity is None and flat:
        person = read_person([folder])
        return {person[0].identity: person}
    names = f"{', '.join(list(found)[:5])}{', …' if len(found) > 5 else ''}"
    if identity is None and alone and len(found) > 1:
        raise InputError(
            f"--identity: whose adapter is it? {folder} has photos of {len(found)} people: {names}"
        )
    if identity is not None and identity not in found:
        raise InputError(f"--identity {identity}: no such person in {folder}; it has {names}")
    return found if identity is None else {identity: found[identity], **found}


def _protocol(
    settings: Resolved[EvaluateConfig],
    people: Mapping[str, Sequence[Photo]],
    out: Path,
    adapter: Path | None,
    hypernet: str | None,
) -> Protocol:
    """The experiment with everything it needs loaded."""
    from hyperdreambooth.apps import job
    from hyperdreambooth.evaluate import protocol
    from hyperdreambooth.evaluate.scorers import load_scorers

    own, frozen = settings.own, job.load(settings.place)
    makers = _makers(own, frozen, hypernet)
    if adapter is not None:
        makers = makers.with_adapter(job.open_adapter(adapter, frozen, hypernet))
    return protocol.Protocol(makers, load_scorers(frozen, own.clip, own.dino, own.face), people, own, out)


def _makers(own: EvaluateConfig, frozen: Base, hypernet: str | None) -> Makers:
    """The base and the hypernetworks that some row needs."""
    from hyperdreambooth.apps import job
    from hyperdreambooth.base.load import EMBEDDED_NAME
    from hyperdreambooth.evaluate.config import methods_of
    from hyperdreambooth.evaluate.methods import Makers
    from hyperdreambooth.hypernet.predictor import load_hypernet

    wanted = {m.network for m in methods_of(own).values() if m.kind in ("prediction", "finetune")}
    named = hypernet is not None or frozen.source == EMBEDDED_NAME
    network = job.load_predictor(hypernet, frozen) if "own" in wanted and named else None
    second = load_hypernet(own.second, frozen.device) if "second" in wanted and own.second else None
    for one in (network, second):
        if one is not None:
            one.check_fits(frozen.fingerprint)
    return Makers(frozen, network, second, None)


def _run(protocol: Protocol, report: Report, out: Path, photos: Path, adapter: Path | None) -> None:
    """Fills the rows, then writes what there is to read."""
    from hyperdreambooth.evaluate.page import write_page, write_sheets
    from hyperdreambooth.evaluate.plots import drawable, write_plots
    from hyperdreambooth.evaluate.report import markdown, summary
    from hyperdreambooth.files import whole_file

    rows: dict[str, Row] = {}
    for name in protocol.methods:
        with report.stage(name):
            rows[name] = protocol.row(name)
    told = summary(protocol, rows)
    plots = write_plots(told, out)
    if not plots:
        why = "no row has a likeness score" if drawable() else "pip install 'hyperdreambooth[plots]'"
        told["missing"].append(f"plots: none; {why}")
    with whole_file(out / "table.md") as part:
        part.write_text(markdown(told), encoding="utf-8")
    write_page(protocol, rows, told, out)
    sheets = write_sheets(protocol, rows, out)
    given = {"photos": str(photos), "adapter": adapter and str(adapter)}
    report.write(out, files=["table.md", "report.html", *plots, *sheets], given=given, **told)
    _tell(told, out)


def _tell(told: Mapping[str, Any], out: Path) -> None:
    """Likeness and prompt following of every row, what is missing, and where to look."""
    from hyperdreambooth.evaluate.plots import FOLLOWING, LIKENESS, axis
    from hyperdreambooth.evaluate.report import cell

    scores = [name for name in (axis(told, LIKENESS), axis(told, FOLLOWING)) if name]
    for name, row in told["rows"].items():
        values = (f"{score} {cell(row['scores'].get(score))}" for score in scores)
        typer.echo(f"{name:20} {'   '.join(values)}")
    for line in told["missing"]:
        typer.echo(f"note: {line}")
    typer.echo(f"look at {out / 'report.html'}")
