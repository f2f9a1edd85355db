"""Personalizes a base, generates pictures at every stage, scores them, and writes one folder."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageDraw
from pydantic import Field
from typer import echo

from hyperdreambooth.adapter import check_forms
from hyperdreambooth.apps.loading import load_personalizer
from hyperdreambooth.apps.person_folder import check_out, save_person
from hyperdreambooth.apps.settings import Job
from hyperdreambooth.apps.training import report_steps
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.evaluate.config import PROMPTS
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.grid import INK, LABEL, PAPER, fit, font, grid
from hyperdreambooth.progress import Progress

Pictures = Mapping[str, Sequence[Image.Image]]
Scores: TypeAlias = dict[str, dict[str, float | None]]

CELL, GAP, MARGIN = 192, 10, 28  # pixels, of the table of pictures
_NOT_SCORED = {
    "identity": "not scored: no other photo of the person; hdb evaluate --adapter takes a folder of them",
    "prompt": "not scored: no prompt asks for anything that the scorer knows",
    "no scorers": "not scored: this base has no scorers",
}


class PersonalizeConfig(FinetuneConfig):
    """The config of `personalize` and `demo`: that of the finetune, and how pictures are generated.

    In the prompts `[V]` is the person and `{class_word}` the base's class word.
    """

    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1)
    draw_steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)


def run_personalization(
    job: Job[PersonalizeConfig],
    photos: Sequence[Photo],
    others: Sequence[Image.Image],
    out: Path,
    hypernet: str | None,
) -> None:
    """Writes adapters, pictures and `report.json`, and prints the scores and where everything is.

    `others` are more photos of the same person, for the identity score only.
    """
    check_out(out)
    own = job.own
    personalizer = load_personalizer(job.base, hypernet)
    personalizer.seconds["load"] = time.perf_counter() - job.began  # with the imports
    base = personalizer.base
    check_forms(base, personalizer.predictor.layout.sites)
    prompts = [prompt.replace("{class_word}", base.class_word) for prompt in own.prompts]
    prediction = personalizer.predict(photos)
    finetuning = FinetuneConfig(**own.model_dump(include=set(FinetuneConfig.model_fields)))
    adapter = personalizer.personalize(photos, config=finetuning, prediction=prediction)
    stages = {"base": None, "prediction": prediction, "finetuned": adapter}
    drawing: dict[str, Any] = {"seed": own.seed, "steps": own.draw_steps, "guidance": own.guidance}
    with Progress("generate", len(stages) * len(prompts)) as bar:
        drawing["drawn"] = lambda _at, _picture: bar.update()
        pictures = {stage: personalizer.generate(prompts, one, **drawing) for stage, one in stages.items()}
    scorers = load_base_scorers(base)
    scores = _scores(scorers, pictures, prompts, others)
    steps = report_steps(adapter.metadata)
    report = save_person(
        out,
        base,
        prediction,
        adapter,
        photo=photos[0],
        picture=_picture(photos[0].open(), prompts, pictures, scores, steps["steps"]),
        seconds={**personalizer.seconds, "total": time.perf_counter() - job.began},
        scores=scores,
        seed=own.seed,
        command=job.command,
        config=job.flat(),
        prompts=prompts,
        base=base.source,
        **steps,
    )
    _print(out, report, scorers is not None)


def _scores(
    scorers: BaseScorers | None, pictures: Pictures, prompts: Sequence[str], others: Sequence[Image.Image]
) -> Scores:
    """Returns `identity` and `prompt` of every stage; None where nothing can be scored."""
    nothing: Mapping[str, float | None] = {"identity": None, "prompt": None}
    found = {
        stage: scorers.summary(images, prompts, others) if scorers else nothing
        for stage, images in pictures.items()
    }
    return {score: {stage: found[stage][score] for stage in pictures} for score in nothing}


def _picture(
    photo: Image.Image, prompts: Sequence[str], pictures: Pictures, scores: Scores, steps: int
) -> Image.Image:
    """Draws the table of stages × prompts, with the scores beside the stages."""
    labels = {"base": "base model", "prediction": "prediction", "finetuned": f"after {steps} steps"}
    rows: dict[str, Sequence[Image.Image]] = {}
    for stage, images in pictures.items():
        values = {score: scores[score][stage] for score in scores}
        notes = [f"{score} {value:.2f}" for score, value in values.items() if value is not None]
        rows["\n".join([labels[stage], *notes])] = images
    return table(photo, prompts, rows)


def _print(out: Path, report: Mapping[str, Any], scored: bool) -> None:
    """Prints scores, seconds and files, a line each."""
    scores: Scores = report["scores"]
    for score, stages in scores.items():
        values = [f"{stage} {value:.2f}" for stage, value in stages.items() if value is not None]
        echo(f"{score:10} {'   '.join(values) or _NOT_SCORED[score if scored else 'no scorers']}")
    seconds = [f"{stage} {value:.1f}" for stage, value in report["seconds"].items()]
    echo(f"{'seconds':10} {'   '.join(seconds)}")
    for name, file in {**report["files"], "report": "report.json"}.items():
        echo(f"{name:10} {out / file}")


def table(
    photo: Image.Image, prompts: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """Draws the photo beside the pictures that were generated from it: label of a row → one a prompt."""
    heads = [shorten(prompt) for prompt in prompts]
    pictures, labels = [*rows.values()], [*rows]
    right = grid(pictures, cell=CELL, row_labels=labels, column_labels=heads, gap=GAP, margin=MARGIN)
    cells = len(rows) * (CELL + GAP) - GAP
    side = min(2 * CELL, cells)
    sheet = Image.new("RGB", (MARGIN + side + right.width, right.height), PAPER)
    sheet.paste(right, (MARGIN + side, 0))
    top = sheet.height - MARGIN - (cells + side) // 2
    sheet.paste(fit(photo, side), (MARGIN, top))
    middle = (MARGIN + side // 2, top - GAP)
    ImageDraw.Draw(sheet).text(middle, "the photo that was given", INK, font(LABEL), anchor="ms")
    return sheet


def shorten(prompt: str) -> str:
    """Drops the words that every prompt has: `a photo of a [V] face, sad` → `sad`."""
    short = re.sub(r"(a photo )?(of )?an? \[V\] ?\w*", ",", prompt)
    parts = [part.strip() for part in short.split(",")]
    return ", ".join(part for part in parts if part) or prompt
