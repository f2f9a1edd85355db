"""Class images for prior preservation (DreamBooth, 3.2): the bare base draws them once for all runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.faces.latents import encoder_key
from hyperdreambooth.files import InputError, cache_home, whole_file
from hyperdreambooth.generate import generate_images
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import rng
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.shots import Shots, digest, encode_all

_TOGETHER = 8  # images drawn in one call
_FORMAT = 1  # raise it when class images come out otherwise


def class_shots(base: Base, config: TrainConfig) -> list[Shots]:
    """Returns the class images that a training shows beside each person's photos; none without a weight.

    They are kept as PNG files in a folder of `cache_home` that is named by the base, the prompt and the seed.
    Image k depends on (seed, k) alone, so an interrupted or smaller set is completed.

    Args:
        base: the base that draws and encodes them.
        config: `prior_weight`, `prior_prompt`, `prior_images` and `seed`.
    """
    if config.prior_weight == 0:
        return []
    caption, count = base.prompt(config.prior_prompt), config.prior_images
    folder = cache_home() / "class" / _folder_name(base, caption, config.seed)
    images = _kept(folder, count)
    missing = [k for k in range(count) if k not in images]
    with Progress("class images", count, len(images)) as bar:
        for at in range(0, len(missing), _TOGETHER):
            part = missing[at : at + _TOGETHER]
            seeds = [int(torch.randint(2**31, (), generator=rng(config.seed, "class", k))) for k in part]
            for k, image in zip(part, generate_images(base, [caption] * len(part), seed=seeds), strict=True):
                images[k] = image
                with whole_file(folder / f"{k:05d}.png") as file:
                    image.save(file, format="PNG")
            bar.update(len(part))
    latents = encode_all(base, [images[k] for k in range(count)])
    return [Shots(latents, (caption,) * count, weight=config.prior_weight)]


def _folder_name(base: Base, caption: str, seed: int) -> str:
    """Returns a name of all that the images depend on, so that another base never gets this one's."""
    pipe = base.pipe
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    drawn_by = encoder_key(base.fingerprint, pipe.vae, decodes=True)
    return digest((
        drawn_by, type(pipe.scheduler).__name__, sorted(scheduler.items()),
        base.parts,  # some can be left out
        base.resolution, caption, seed, _FORMAT, *([base.quantize] if base.quantize else []),
    ))  # fmt: skip


def _kept(folder: Path, count: int) -> dict[int, Image.Image]:
    """Returns the images that an earlier run has drawn; a damaged one is missing and so drawn again."""
    found: dict[int, Image.Image] = {}
    for k in range(count):
        with suppress(InputError):
            found[k] = open_photo(folder / f"{k:05d}.png")
    return found
