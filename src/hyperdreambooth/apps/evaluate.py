"""`hdb evaluate`: scores of methods over people × prompts × seeds, with intervals, plots and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import Cluster, HypernetName, ShardOf, command, one_way

if TYPE_CHECKING:
    from hyperdreambooth.apps.settings import Job
    from hyperdreambooth.evaluate.config import EvaluateConfig
    from hyperdreambooth.evaluate.protocol import Protocol, Row
    from hyperdreambooth.faces.dataset import Photo

PHOTOS = 8  # of each rendered person: one for the methods, one for the bound, six to compare with
ROWS_OF_A_FILE = ("another-photo", "somebody-else", "base", "adapter")

_PHOTOS_HELP = "A folder of photos with one sub-folder a person [for the embedded base: rendered people]."
_PRESET_HELP = "A TOML, YAML or JSON file, or a preset: avatars-small, avatars, paper."
PresetOrFile = Annotated[Path | None, Option("--config", "--preset", help=_PRESET_HELP)]


def _check_rows(job: Job[EvaluateConfig], own: Mapping[str, Any]) -> Job[EvaluateConfig]:
    """Checks the rows; with --adapter, chooses one person and rows without training."""
    from hyperdreambooth.evaluate.config import methods_of

    if own["adapter"]:
        rows = job.own.rows if "adapter" in job.own.rows else ROWS_OF_A_FILE
        job = replace(job, own=job.own.model_copy(update={"rows": rows, "identities": 1}))
    methods_of(job.own)
    return one_way(job, own)


@command(
    "hyperdreambooth.evaluate.config:EvaluateConfig", "identities", "seeds",
    adjust=_check_rows, config_option=PresetOrFile,
)  # fmt: skip
def evaluate(
    job: Job[EvaluateConfig],
    out: Annotated[
        Path,
        Option(help="The folder for pictures, report.json, report.html and plots."),
        checks.result_of("evaluate"),
    ],
    photos: Annotated[Path | None, Argument(help=_PHOTOS_HELP), Check(checks.people)] = None,
    adapter: Annotated[
        Path | None,
        Option(help="Evaluate this adapter file instead of the methods."),
        Check(checks.adapters),
    ] = None,
    identity: Annotated[str | None, Option(help="The person of --adapter: a sub-folder of PHOTOS.")] = None,
    hypernet: HypernetName = None,
    cluster: Cluster = None,
    shard: ShardOf = None,
) -> None:
    """Run the paper's experiment: compare methods side by side.

    The methods get the first photo of each person. The last photo serves as a bound, and the others are what
    pictures are compared with. Without PHOTOS, the embedded base is evaluated on people that no training has
    seen; they are rendered into OUT/photos. Run it again to continue, or with more people, prompts, seeds or
    rows (--set 'rows=["base", "hyperdreambooth@20"]') to add to what is there.
    """
    from hyperdreambooth.apps import elsewhere
    from hyperdreambooth.cluster.shards import Shard, forget_shards
    from hyperdreambooth.files import check_apart

    if photos is not None:
        check_apart(out, photos)
    if photos is None:
        with job.stage("render"):
            photos = _rendered(job, out, adapter)
    with job.stage("load"):
        people = _people(photos, identity, adapter is not None)
        protocol = protocol_of(elsewhere.at_home(job) if cluster else job, people, out, adapter, hypernet)
    if shard and (part := Shard.parse(shard)):
        count = elsewhere.evaluate_shard(job, protocol, part)
        echo(f"{out}: shard {part}, {count} parts; merge when all shards are done")
        return
    if shard:
        elsewhere.check_evaluated(job, protocol)
    if cluster:
        recipe = partial(elsewhere.evaluator, job, people, out, adapter, hypernet)
        with job.stage("cluster"):
            elsewhere.evaluate_on_ray(job, protocol, recipe, cluster)
    _run(protocol, job, out, photos, adapter)
    forget_shards(out)


def _rendered(job: Job[EvaluateConfig], out: Path, adapter: Path | None) -> Path:
    """Renders avatars that no training has seen, as many as the config asks for."""
    from hyperdreambooth.avatars.folder import render_folder
    from hyperdreambooth.base.load import is_embedded
    from hyperdreambooth.files import InputError

    if adapter is not None or not is_embedded(job.base.base):
        raise InputError(
            "PHOTOS: expected a folder of photos with one sub-folder a person, got none; only the methods of "
            "the embedded base can be evaluated without photos"
        )
    render_folder(out / "photos", "test", job.own.identities, PHOTOS)
    return out / "photos"


def _people(folder: Path, identity: str | None, alone: bool) -> Mapping[str, Sequence[Photo]]:
    """Reads the people of a folder, the named one first; photos in no sub-folder are of one person alone."""
    from hyperdreambooth.faces.dataset import read_faces, read_person
    from hyperdreambooth.files import InputError

    people = read_faces(folder)
    flat = all(photo.path.parent == folder for photos in people.values() for photo in photos)
    if alone and identity is None and flat:
        person = read_person(folder)
        return {person[0].identity: person}
    names = ", ".join([*people][:5]) + (", …" if len(people) > 5 else "")
    if identity is None and alone and len(people) > 1:
        raise InputError(
            f"--identity: expected the person of the adapter, got none; {folder} has photos of "
            f"{len(people)} people: {names}"
        )
    if identity is not None and identity not in people:
        raise InputError(f"--identity {identity}: no such person in {folder}; it has {names}")
    return people if identity is None else {identity: people[identity], **people}


def protocol_of(
    job: Job[EvaluateConfig],
    people: Mapping[str, Sequence[Photo]],
    out: Path,
    adapter: Path | None,
    hypernet: str | None,
) -> Protocol:
    """Loads everything that the experiment needs; of the hypernetworks, those that some row needs."""
    from hyperdreambooth.apps.loading import load, open_adapter
    from hyperdreambooth.base.load import EMBEDDED_NAME
    from hyperdreambooth.evaluate.config import methods_of
    from hyperdreambooth.evaluate.methods import Makers
    from hyperdreambooth.evaluate.protocol import Protocol
    from hyperdreambooth.evaluate.scorers import load_scorers
    from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, load_hypernet

    own = job.own
    whole = any(method.settings.get("method") == "full" for method in methods_of(own).values())
    base = load(job.base, exact=whole)
    needed = {m.network for m in methods_of(own).values() if m.kind in ("prediction", "finetune")}
    source = hypernet or (EMBEDDED_HYPERNET if base.source == EMBEDDED_NAME else None)
    first = load_hypernet(source, base.device) if "own" in needed and source else None
    second = load_hypernet(own.second, base.device) if "second" in needed and own.second else None
    for predictor in (first, second):
        if predictor is not None:
            predictor.check_fits(base.fingerprint)
    worn = None if adapter is None else open_adapter(adapter, base, hypernet)
    scorers = load_scorers(base, own.clip, own.dino, own.face)
    return Protocol(Makers(base, first, second, worn), scorers, people, own, out)


def _run(protocol: Protocol, job: Job[EvaluateConfig], out: Path, photos: Path, adapter: Path | None) -> None:
    """Computes the rows and writes table, page, plots and sheets."""
    from hyperdreambooth.evaluate.page import write_page, write_sheets
    from hyperdreambooth.evaluate.plots import drawable, write_plots
    from hyperdreambooth.evaluate.report import markdown, summary
    from hyperdreambooth.files import whole_file

    rows: dict[str, Row] = {}
    for name in protocol.methods:
        with job.stage(name):
            rows[name] = protocol.row(name)
    results = summary(protocol, rows)
    plots = write_plots(results, out)
    if not plots:
        nothing = "no row was trained, and none has both an identity and a prompt score"
        why = nothing if drawable() else "pip install 'hyperdreambooth[plots]'"
        results["missing"].append(f"no plots: {why}")
    with whole_file(out / "table.md") as part:
        part.write_text(markdown(results), encoding="utf-8")
    write_page(protocol, rows, results, out)
    sheets = write_sheets(protocol, rows, out)
    given = {"photos": str(photos), "adapter": adapter and str(adapter)}
    job.report(out, files=["table.md", "report.html", *plots, *sheets], given=given, **results)
    _print(results, out)


def _print(results: Mapping[str, Any], out: Path) -> None:
    """Prints identity, leak and prompt score of every row, what is missing, and where the page is."""
    from hyperdreambooth.evaluate.plots import FOLLOWING, LIKENESS, axis
    from hyperdreambooth.evaluate.report import cell

    likeness = axis(results, LIKENESS) or LIKENESS[0]
    scores = [name for name in (likeness, axis(results, ("leak",)), axis(results, FOLLOWING)) if name]
    for name, row in results["rows"].items():
        values = (f"{score} {cell(row['scores'].get(score))}" for score in scores)
        echo(f"{name:20} {'   '.join(values)}")
    for line in results["missing"]:
        echo(f"note: {line}")
    echo(f"see {out / 'report.html'}")
