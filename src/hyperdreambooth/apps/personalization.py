"""Makes a person from photos, draws pictures at every stage, scores them, and writes one folder.

`personalize` and `demo` start from a hypernetwork's prediction, `dreambooth` and `personalize --method lora`
from scratch. Everything is written as soon as it is made, and the same command goes on from there
(`person_folder.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from PIL import Image
from typer import echo

from hyperdreambooth.adapter import FILES, Adapter, check_forms
from hyperdreambooth.apps.familiarity import report_distance
from hyperdreambooth.apps.loading import load, load_personalizer
from hyperdreambooth.apps.person_config import PersonalizeConfig, ScratchConfig
from hyperdreambooth.apps.person_folder import (
    PERSON,
    check_person,
    kept_prediction,
    save_card,
    sweep,
)
from hyperdreambooth.apps.saving import save_trained
from hyperdreambooth.apps.settings import Job
from hyperdreambooth.apps.training import report_steps
from hyperdreambooth.apps.work import UNNAMED, Work, draw_stage, draw_unnamed, look_score, save_pictures
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.base_scorers import load_base_scorers, why_not_scored
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import read_json
from hyperdreambooth.finetune.config import USUAL, DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import TrainedPerson, dreambooth
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import Run
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.looks import Look, look_steps
from hyperdreambooth.training.shots import inputs_of, person_key

Stages: TypeAlias = Mapping[str, TrainedPerson | None]
Scores: TypeAlias = dict[str, dict[str, float | None]]
Config = TypeVar("Config", bound=TrainConfig)

_ALONE = (
    "not scored: only one photo was given; of two or more, the last is kept out of the training to judge by"
)


def run_personalization(
    job: Job[Any],
    photos: Sequence[Photo],
    others: Sequence[Image.Image],
    out: Path,
    hypernet: str | None = None,
) -> None:
    """Makes a person, by the method of the config, and draws; the same call goes on from what is kept.

    `others` are more photos of the same person, for the identity score only.
    """
    check_person(out, photos)
    if job.own.method == "hypernetwork":
        _by_prediction(job, photos, others, out, hypernet)
    else:
        _from_scratch(job, photos, others, out)


def _by_prediction(
    job: Job[PersonalizeConfig],
    photos: Sequence[Photo],
    others: Sequence[Image.Image],
    out: Path,
    hypernet: str | None,
) -> None:
    """Predicts, relaxes and finetunes."""
    personalizer = load_personalizer(job.base, hypernet)
    job.seconds["load"] = round(time.perf_counter() - job.began, 3)  # with the imports
    check_forms(personalizer.base, personalizer.predictor.layout.sites)
    inputs = {"hypernet": personalizer.predictor.fingerprint}
    work = _begin(job, personalizer.base, photos, others, out, inputs)
    distance = report_distance(personalizer, work.photos, drawn=bool(others))
    made = personalizer.predict(work.photos)
    prediction = kept_prediction(out, made, personalizer.load)
    plain = FinetuneConfig(**job.own.model_dump(include=set(FinetuneConfig.model_fields)))
    config, look = _looked_at(work, plain, FinetuneConfig().last, samples=False)
    left_out = distance is not None and distance > 1 and not job.own.finetune_strange
    if left_out:
        echo("the finetune is left out; --set finetune_strange=true with another --out does it anyway")
        look = None
        adapter = prediction.relax(max(config.rank, prediction.rank), config.seed)
    else:
        adapter = personalizer.personalize(
            work.photos, config=config, prediction=prediction, out=out / "training", look=look
        )
    job.seconds.update({stage: round(value, 3) for stage, value in personalizer.seconds.items()})
    files = {"lidb": FILES["lidb"], **save_trained(adapter, out, work.base)}
    stages = {"base": None, "prediction": prediction, "finetuned": adapter}
    if left_out:
        del stages["finetuned"]
    _finish(job, work, stages, adapter, files, look, distance)


def _from_scratch(
    job: Job[ScratchConfig], photos: Sequence[Photo], others: Sequence[Image.Image], out: Path
) -> None:
    """Trains without a hypernetwork."""
    base = load(job.base, exact=job.own.method == "full")
    job.seconds["load"] = round(time.perf_counter() - job.began, 3)
    if job.own.method in ("lidb", "lora"):
        check_forms(base, base.sites)
    work = _begin(job, base, photos, others, out, {})
    plain = DreamboothConfig(**job.own.model_dump(include=set(DreamboothConfig.model_fields)))
    config, look = _looked_at(work, plain, USUAL[plain.method]["steps"], samples=True)
    with job.stage("train"):
        person = dreambooth(base, work.photos, out / "training", config, look=look)
    files = save_trained(person, out, base)
    _finish(job, work, {"base": None, "trained": person}, person, files, look)


def _begin(
    job: Job[Any],
    base: Base,
    photos: Sequence[Photo],
    others: Sequence[Image.Image],
    out: Path,
    inputs: Mapping[str, str],
) -> Work:
    """Binds the folder to all that the person is made from, and holds a photo out if it can be judged by."""
    scorers, trained, judges = load_base_scorers(base), photos, list(others)
    if scorers is not None and job.own.hold_out and not others and len(photos) > 1:
        trained, judges = photos[:-1], [photos[-1].open()]
    entries = {**inputs, PERSON: person_key(photos), "held_out": str(len(photos) - len(trained))}
    Run(out, job.own, inputs={**inputs_of(base, [photos], job.own), **entries})
    sweep(out)
    return Work(base, job.own, job.own.seed, out, photos, trained, judges, scorers)


def _looked_at(work: Work, config: Config, usual: int, *, samples: bool) -> tuple[Config, Look | None]:
    """Returns the training's config, and how it is looked at, if it is.

    With `steps = "auto"`, looks choose among the `usual` steps where identity and prompt can be scored.
    Elsewhere the loss chooses: identity alone would favour the last step.
    """
    auto = config.steps == "auto"
    judged = work.scorers is not None and work.scorers.reader is not None
    if (auto and not judged) or not (auto or samples):
        return config, None
    fixed = config.model_copy(update={"steps": min(config.most, usual) if auto else config.steps})
    return fixed, Look(look_steps(fixed.last), look_score(work), choose=auto)


def _finish(
    job: Job[Any],
    work: Work,
    stages: Stages,
    person: TrainedPerson,
    files: Mapping[str, str],
    look: Look | None,
    distance: float | None = None,
) -> None:
    """Draws and scores every stage, writes the rest of the folder, the report last, and prints it."""
    with job.stage("generate"), Progress("generate", (len(stages) + 1) * len(work.prompts)) as bar:
        pictures = {stage: draw_stage(work, stage, one, work.prompts, bar) for stage, one in stages.items()}
        unnamed, leak = draw_unnamed(work, person, bar)
    found = {stage: work.score(images, work.prompts) for stage, images in pictures.items()}
    pictures[UNNAMED], found[UNNAMED] = unnamed, {"leak": leak}
    steps = report_steps(person.metadata)
    more = save_pictures(work, pictures, found, steps["steps"], look)
    if isinstance(person, Adapter):
        forms = files if "prediction" in stages else set(files) - {"lidb"}  # the card calls it a prediction
        more |= save_card(work.out, person, work.base.class_word, forms)
    rank = person.rank if isinstance(person, Adapter) else None
    scores: Scores = {s: {stage: found[stage][s] for stage in stages} for s in ("identity", "prompt")}
    scores["leak"] = {[*stages][-1]: leak}
    if "prediction" in stages and "finetuned" not in stages:
        scores = {score: {**values, "finetuned": None} for score, values in scores.items()}
    held_out = work.given[-1].path.name if len(work.photos) < len(work.given) else None
    job.report(
        work.out, files={**files, **more}, scores=scores, rank=rank, trigger=work.base.trigger,
        prompts=work.prompts, base=work.base.source, distance=distance, photos=len(work.given),
        held_out=held_out, judge=work.scorers and work.scorers.judge.summary(), **steps,
    )  # fmt: skip
    _print(work, read_json(work.out / "report.json"))


def _print(work: Work, report: Mapping[str, Any]) -> None:
    """Prints scores, seconds and files, a line each."""
    for score, stages in report["scores"].items():
        if score == "leak" and not any(value is not None for value in stages.values()):
            continue  # for the reason that is told of the identity
        values = [f"{stage} {value:.2f}" for stage, value in stages.items() if value is not None]
        alone = score == "identity" and work.scorers is not None and not work.judges and len(work.given) == 1
        reason = _ALONE if alone else why_not_scored(work.scorers, score)
        echo(f"{score:10} {'   '.join(values) or reason}")
    if report["held_out"]:
        echo(f"{'judged by':10} {report['held_out']}, which was left out of the training")
    seconds = [f"{stage} {value:.1f}" for stage, value in report["seconds"].items()]
    echo(f"{'seconds':10} {'   '.join(seconds)}")
    for name, file in {**report["files"], "report": "report.json"}.items():
        echo(f"{name:10} {work.out / file}")
