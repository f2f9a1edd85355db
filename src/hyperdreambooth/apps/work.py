"""One person in the making: the pictures of every stage and look are drawn, kept and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.apps.person_config import Drawing
from hyperdreambooth.apps.person_folder import (
    read_picture,
    same_pictures,
    save_photo,
    save_picture,
    weights_key,
)
from hyperdreambooth.apps.picture import labelled, strip, table
from hyperdreambooth.base.conditioning import class_caption
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.base_scorers import BaseScorers
from hyperdreambooth.evaluate.protocol import nameless
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.finetune.dreambooth import TrainedPerson
from hyperdreambooth.finetune.word import Word
from hyperdreambooth.generate import generate_images
from hyperdreambooth.progress import Progress
from hyperdreambooth.training.looks import Look
from hyperdreambooth.training.shots import digest
from hyperdreambooth.training.trainable import hashed

Pictures: TypeAlias = Mapping[str, Sequence[Image.Image]]

UNNAMED = "unnamed"  # the stage of pictures without the word for the person
TOGETHER = 4  # pictures drawn in one batch, which a kill loses together
LOOK_PROMPTS, LOOK_STEPS = 8, 10  # of the pictures of a look: small sets of fast ones


@dataclass(frozen=True)
class Work:
    """One person in the making.

    Attributes:
        base: the base, with the words for the person.
        drawing: how pictures are generated.
        seed: of pictures.
        out: the person's folder.
        given: the photos that were given.
        photos: those that are trained on.
        judges: further photos of the person, for the identity score only.
        scorers: the base's own; None if it has none.
    """

    base: Base
    drawing: Drawing
    seed: int
    out: Path
    given: Sequence[Photo]
    photos: Sequence[Photo]
    judges: Sequence[Image.Image]
    scorers: BaseScorers | None

    @property
    def prompts(self) -> list[str]:
        """The prompts with the base's class word."""
        return [prompt.replace("{class_word}", self.base.class_word) for prompt in self.drawing.prompts]

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float | None]:
        """Returns `identity` and `prompt` of some pictures; None for what cannot be scored."""
        if self.scorers is None:
            return {"identity": None, "prompt": None}
        return self.scorers.summary(pictures, prompts, self.judges)


def look_score(work: Work) -> Callable[[int], float | None]:
    """Returns what draws the pictures of a look, keeps them, and weighs identity against prompt.

    One point of identity is worth one of prompt. Where no other photo of the person is at hand, identity is
    judged by the reference photo, which is good enough to compare looks.
    """
    prompts = work.prompts[:LOOK_PROMPTS]

    def score(step: int) -> float | None:
        pictures = generate_images(
            work.base, prompts, seed=work.seed, steps=LOOK_STEPS, guidance=work.drawing.guidance
        )
        for k, picture in enumerate(pictures):
            save_picture(_look_file(work, step, k), picture)
        if work.scorers is None:
            return None
        judges = work.judges or [work.photos[0].open()]
        found = work.scorers.summary(pictures, prompts, judges).values()
        known = [value for value in found if value is not None]
        return sum(known) if known else None

    return score


def _look_file(work: Work, step: int, k: int) -> Path:
    return work.out / "training" / "looks" / f"{step:05d}-{k}.png"


def draw_stage(
    work: Work, stage: str, person: TrainedPerson | None, prompts: Sequence[str], bar: Progress
) -> list[Image.Image]:
    """Returns a stage's pictures, one a prompt, from the folder or drawn."""
    drawing, done = work.drawing, list[Image.Image]()
    options: dict[str, Any] = {"seed": work.seed, "steps": drawing.draw_steps, "guidance": drawing.guidance}
    made_from = [digest((_key(person), prompt, sorted(options.items()))) for prompt in prompts]
    adapter = person if isinstance(person, Adapter) else None
    whole = None if isinstance(person, Adapter) else person
    for start in range(0, len(prompts), TOGETHER):
        part = slice(start, start + TOGETHER)
        files = [work.out / "pictures" / f"{stage}-{k:02d}.png" for k in range(len(prompts))][part]

        def draw(asked: Sequence[str] = prompts[part]) -> list[Image.Image]:
            with whole.worn(work.base) if whole else nullcontext():
                return generate_images(work.base, asked, adapter, **options)

        done += same_pictures(files, made_from[part], draw)
        bar.update(len(files))
    return done


def draw_unnamed(
    work: Work, person: TrainedPerson | None, bar: Progress
) -> tuple[list[Image.Image], float | None]:
    """Draws a person from prompts that name the class alone.

    Returns:
        The pictures, which should show anybody else, and how much they show the person: the `leak`.
    """
    prompts = [class_caption(work.base, prompt) for prompt in work.prompts]
    pictures = draw_stage(work, UNNAMED, nameless(person), prompts, bar)
    return pictures, work.score(pictures, prompts)["identity"]


def _key(person: TrainedPerson | None) -> str:
    """Names a person by the content of the weights."""
    if person is None:
        return "base"
    if isinstance(person, Adapter):
        return hashed([person.factors])
    return weights_key({"word": person.vector} if isinstance(person, Word) else person.weights)


def save_pictures(
    work: Work,
    pictures: Pictures,
    scores: Mapping[str, Mapping[str, float | None]],
    steps: int,
    look: Look | None,
) -> dict[str, str]:
    """Writes the table of stages × prompts, the photo and the strip of looks; returns what → file name.

    Of `pictures`, those without the word for the person come last, after those of the finished person.
    """
    after = f"after {steps} steps"
    labels = {"base": "base model", "prediction": "prediction", "finetuned": after, "trained": after}
    *_, last, _ = pictures
    labels[UNNAMED] = f"{labels[last]}, without the word"
    rows = {labelled(labels[stage], scores[stage]): images for stage, images in pictures.items()}
    count = len(work.given)
    words = "the photo that was given" if count == 1 else f"the first of {count} photos"
    photo = work.photos[0]
    save_picture(work.out / "picture.png", table(photo.open(), work.prompts, rows, words))
    files = {"picture": "picture.png", **save_photo(work.out, photo)}
    if look is None:
        return files
    save_picture(work.out / "strip.png", _strip(work, look, steps))
    return {**files, "strip": "strip.png"}


def _strip(work: Work, look: Look, kept: int) -> Image.Image:
    """Draws the looks at the training, each with its scores."""
    prompts, rows = work.prompts[:LOOK_PROMPTS], dict[str, Sequence[Image.Image | None]]()
    for step in look.at:
        pictures = [read_picture(_look_file(work, step, k)) for k in range(len(prompts))]
        seen = [picture for picture in pictures if picture is not None]
        scores = work.score(seen, prompts) if len(seen) == len(prompts) else {}
        label = f"step {step}, kept" if look.choose and step == kept else f"step {step}"
        rows[labelled(label, scores)] = pictures
    return strip(prompts, rows)
