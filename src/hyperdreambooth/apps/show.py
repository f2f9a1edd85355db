"""The whole job with something to look at: predict, relax, finetune, draw every stage, score, one folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import typer
from PIL import Image
from pydantic import Field

from hyperdreambooth.apps.job import load_personalizer, steps_of
from hyperdreambooth.apps.options import Resolved
from hyperdreambooth.apps.picture import table
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.evaluate.config import PROMPTS
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.personalize import check_out, save_person

Pictures = Mapping[str, Sequence[Image.Image]]
Scores: TypeAlias = dict[str, dict[str, float | None]]


_WHY_NOT = {
    "identity": "not judged, for want of another photo; hdb evaluate --adapter takes a folder of them",
    "prompt": "not judged: no prompt asks for what the judge knows",
    "no judges": "not judged: this base brings no scorers",
}


class ShowConfig(FinetuneConfig):
    """The config of `personalize` and `demo`: the finetune's fields, and how pictures are drawn.

    Attributes:
        prompts: what is drawn at every stage; `[V]` is the person, `{class_word}` the base's.
        draw_steps: denoising steps a picture.
        guidance: classifier-free guidance.
    """

    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1)
    draw_steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)

    def finetuning(self) -> dict[str, Any]:
        """The fields that the finetune takes."""
        return self.model_dump(include=set(FinetuneConfig.model_fields))


def show(
    command: str, settings: Resolved[ShowConfig], photos: Sequence[Photo], others: Sequence[Image.Image],
    out: Path, hypernet: str | None, began: float,
) -> dict[str, Any]:  # fmt: skip
    """Personalizes and writes adapters, pictures and `report.json`; prints scores and where everything is.

    Args:
        command: `demo` or `personalize`.
        settings: the resolved config.
        photos: of the one person.
        others: more photos of that person, for scores only; without them identity is null.
        out: the folder; appears whole.
        hypernet: folder or hub id; None for the embedded one.
        began: `time.perf_counter()` when the command began, so that imports count as loading.

    Returns:
        The report.
    """
    check_out(out)
    own = settings.own
    person = load_personalizer(settings.place, hypernet)
    person.seconds["load"] = time.perf_counter() - began
    prompts = [prompt.replace("{class_word}", person.base.class_word) for prompt in own.prompts]
    paths = [photo.path for photo in photos]
    prediction = person.predict(paths)
    finetuned = person.personalize(paths, prediction=prediction, **own.finetuning())
    options = {"steps": own.draw_steps, "guidance": own.guidance}
    pictures = person.stages(prompts, prediction, finetuned, own.seed, **options)
    scorers = load_base_scorers(person.base)
    scores = _scores(scorers, pictures, prompts, others)
    taken = steps_of(finetuned.metadata)
    picture = _picture(open_photo(paths[0]), prompts, pictures, scores, taken["steps"])
    seconds = {**person.seconds, "total": time.perf_counter() - began}
    facts = {"command": command, "config": settings.plain(), "prompts": prompts, "base": person.base.source}
    facts |= {"stopped": taken["stopped"]} if "stopped" in taken else {}
    report = save_person(
        out,
        person.base,
        prediction,
        finetuned,
        photo=photos[0],
        picture=picture,
        seconds=seconds,
        scores=scores,
        seed=own.seed,
        facts=facts,
    )
    _tell(out, report, scorers is not None)
    return report


def _scores(
    scorers: BaseScorers | None, pictures: Pictures, prompts: Sequence[str], others: Sequence[Image.Image]
) -> Scores:
    """`identity` and `prompt`, of every stage; null where nothing can judge."""
    found: Mapping[str, Mapping[str, float | None]] = {
        stage: scorers.summary(images, prompts, others) if scorers else {}
        for stage, images in pictures.items()
    }
    return {score: {stage: found[stage].get(score) for stage in pictures} for score in ("identity", "prompt")}


def _picture(
    photo: Image.Image, prompts: Sequence[str], pictures: Pictures, scores: Scores, steps: int
) -> Image.Image:
    """The table of stages, with the scores as notes."""
    labels = {"base": "base model", "prediction": "prediction", "finetuned": f"after {steps} steps"}
    rows: dict[str, Sequence[Image.Image]] = {}
    for stage, images in pictures.items():
        values = {score: scores[score][stage] for score in scores}
        notes = [f"{score} {value:.2f}" for score, value in values.items() if value is not None]
        rows["\n".join([labels[stage], *notes])] = images
    return table(photo, prompts, rows)


def _tell(out: Path, report: Mapping[str, Any], judged: bool) -> None:
    """Scores, seconds and places, a line each."""
    scores: Mapping[str, Mapping[str, float | None]] = report["scores"]
    for score, stages in scores.items():
        values = [f"{stage} {value:.2f}" for stage, value in stages.items() if value is not None]
        typer.echo(f"{score:10} {'   '.join(values) or _WHY_NOT[score if judged else 'no judges']}")
    typer.echo(
        f"{'seconds':10} {'   '.join(f'{stage} {value:.1f}' for stage, value in report['seconds'].items())}"
    )
    for name, file in {**report["files"], "report": "report.json"}.items():
        typer.echo(f"{name:10} {out / file}")
