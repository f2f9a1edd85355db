"""Loads what commands work on: the base, the hypernetwork, adapter files, the judge of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path

import diffusers
import huggingface_hub.utils
import transformers
from PIL import Image

from hyperdreambooth.adapter import Adapter, load_adapter
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.base.load import Base, is_embedded, load_base
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.files import InputError
from hyperdreambooth.generate import generate_images
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, hypernet_folder, load_hypernet, load_info
from hyperdreambooth.hypernet.validate import PersonSampler, Score
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.personalize import Personalizer
from hyperdreambooth.shapes import Factors
from hyperdreambooth.training.trainable import each


def load(config: BaseConfig, exact: bool = False) -> Base:
    """Loads the base that a command's config names, without the bars of libraries that read local files.

    With `exact`, `dtype = "auto"` is float32: for what trains the base's own weights or saves them.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # of downloads
    told = config.model_dump(exclude={"base"})
    if exact and config.dtype == "auto":
        told["dtype"] = "float32"
    return load_base(config.base, **told)


def load_personalizer(config: BaseConfig, hypernet: str | None) -> Personalizer:
    """Loads the base and its hypernetwork; None stands for the hypernetwork of the embedded avatars."""
    if hypernet is None and not is_embedded(config.base):
        raise InputError(
            f"hypernet: expected the one trained for base {config.base}, got none; name its folder "
            "or hub id with --hypernet, or train the person without one: --method lora"
        )
    folder = hypernet_folder(hypernet or EMBEDDED_HYPERNET)
    info = load_info(folder)
    for key in ("trigger", "class_word"):  # before gigabytes are loaded
        trained, asked = getattr(info, key), getattr(config, key)
        if asked not in (None, trained):
            raise InputError(
                f"{key}: the hypernetwork was trained with {trained!r}, got {asked!r}; leave it out"
            )
    base = load(config)
    return Personalizer(base, load_hypernet(folder, base.device))


def open_adapter(file: Path, base: Base, hypernet: str | None = None) -> Adapter:
    """Opens an adapter file of any format and checks it against the base that will wear it.

    The hypernetwork is the one that predicted it, and holds the aux bases if they were learned.
    """

    def basis_of(source: str) -> Basis:
        basis = load_hypernet(hypernet or EMBEDDED_HYPERNET, base.device).basis
        if basis.source != source:
            raise InputError(
                f"{file}: expected a LiDB over the aux bases {basis.source}, got one over {source}; "
                "pass the hypernetwork that predicted it with --hypernet"
            )
        return basis

    return load_adapter(file, base, basis_of)


def open_all(
    files: Sequence[Path], weights: Sequence[float], base: Base, hypernet: str | None = None
) -> list[Adapter]:
    """Opens adapter files, each times its weight, 1 where none are given."""
    if strange := [weight for weight in weights if not math.isfinite(weight)]:
        raise InputError(f"--weight: expected finite numbers, got {strange[0]}")
    if len(weights) not in (0, len(files)):
        raise InputError(
            f"--weight: expected one for each of the {len(files)} adapters or none, got {len(weights)}"
        )
    adapters = [open_adapter(file, base, hypernet) for file in files]
    return [weight * one for one, weight in zip(adapters, weights, strict=True)] if weights else adapters


def open_sum(
    files: Sequence[Path], weights: Sequence[float], base: Base, hypernet: str | None = None
) -> Adapter | None:
    """Adds adapter files up with their weights; None where there are no files."""
    weighted = open_all(files, weights, base, hypernet)
    return reduce(add, weighted) if weighted else None


def validation(base: Base) -> tuple[PersonSampler, Score | None]:
    """Returns what generates a hypernetwork's validation pictures, and what scores them if the base can."""

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
    """Returns the mean `identity` of people with other photos, and the mean `prompt`, if any is scored."""
    likeness = [
        score
        for image, paths in zip(images, others, strict=True)
        if paths and (score := scorers.identity([image], [open_photo(path) for path in paths])[0]) is not None
    ]
    identity = sum(likeness) / len(likeness) if likeness else None
    scores = {"identity": identity, "prompt": scorers.summary(images, prompts)["prompt"]}
    return {name: value for name, value in scores.items() if value is not None}
