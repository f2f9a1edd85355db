"""What trainings take from higher layers: class images, validation pictures and scores, and saving."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.apps.saving import save_forms
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.finetune.dreambooth import TrainedPerson
from hyperdreambooth.finetune.word import Word
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.validate import PersonSampler, Score
from hyperdreambooth.shapes import Factors
from hyperdreambooth.training.trainable import each

WORD = "learned_embeds.safetensors"
"""The name that diffusers gives the file of a textual inversion."""


def save_trained(person: TrainedPerson, out: Path, base: Base) -> dict[str, str]:
    """Writes what DreamBooth trained: the forms of an adapter, a whole pipeline, or the embedding of a word.

    Returns:
        form → file or folder name.
    """
    if isinstance(person, Adapter):
        return save_forms(person, out)
    if isinstance(person, Word):
        person.save(out / WORD)
        return {"textual-inversion": WORD}
    person.save(out / "pipeline", base)
    return {"pipeline": "pipeline"}


def validation(base: Base) -> tuple[PersonSampler, Score | None]:
    """Returns what generates and scores the validation pictures of a hypernetwork in training.

    The score is None if the base has no scorers.
    """

    def sample(prompts: Sequence[str], factors: Factors) -> list[Image.Image]:
        people = [Adapter(one, base.trigger, base.fingerprint, base.source) for one in each(factors)]
        return generate_images(base, prompts, people)

    scorers = load_base_scorers(base)
    return sample, partial(_mean_scores, scorers) if scorers is not None else None


def _mean_scores(
    scorers: BaseScorers,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    others: Sequence[Sequence[Path]],
) -> dict[str, float]:
    """Returns the mean `identity` of the people who have another photo, and the mean `prompt`.

    A score is left out if nothing can be scored.
    """
    known = [(image, paths) for image, paths in zip(images, others, strict=True) if paths]
    likeness = [scorers.identity([image], [open_photo(path) for path in paths])[0] for image, paths in known]
    identity = sum(likeness) / len(likeness) if likeness else None
    scores = {"identity": identity, "prompt": scorers.summary(images, prompts)["prompt"]}
    return {name: value for name, value in scores.items() if value is not None}
