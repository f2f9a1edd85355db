"""What the loop is fed: latents and captions of the person and, for prior preservation, of the class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.base.conditioning import warn_unnamed
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import open_photo, to_pixels
from hyperdreambooth.faces.landmarks import Landmarks, check_face, face_oval, in_square
from hyperdreambooth.faces.latents import encoder_key
from hyperdreambooth.files import InputError, cache_home, whole_file
from hyperdreambooth.finetune.config import TrainConfig
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import rng

ClassSampler: TypeAlias = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""Prompts and a seed for each → a picture each."""

Photos: TypeAlias = Sequence[Photo]
"""Of one person."""

T = TypeVar("T")
_TOGETHER = 8  # pictures encoded or drawn in one call
_CLASS_FORMAT = 1  # raise it when class images come out otherwise


@dataclass(frozen=True)
class Shots:
    """Latents `(m, c, h, w)` on the base's device, their captions, and how their loss counts.

    Attributes:
        latents: `(m, c, h, w)` on the base's device.
        captions: a caption each.
        weight: of their loss, against 1 for a person's photos.
        background: weight of the loss outside the oval of the face; 1 for all of the picture alike.
        landmarks: of each photo, in sides of the square; None, or nothing, where the face is in the middle.
    """

    latents: Tensor
    captions: tuple[str, ...]
    weight: float = 1.0
    background: float = 1.0
    landmarks: tuple[Landmarks | None, ...] = ()

    def part(self, first: int, end: int | None) -> Shots:
        """Those from `first` to `end`."""
        own = {name: getattr(self, name)[first:end] for name in ("latents", "captions", "landmarks")}
        return replace(self, **own)

    def mask(self, index: int = 0) -> Tensor:
        """Weights `(1, h, w)` of the loss of one photo."""
        points = self.landmarks[index] if self.landmarks else None
        height, width = self.latents.shape[-2:]
        oval = face_oval(height, width, points).to(self.latents.device)
        return (self.background + (1 - self.background) * oval)[None]


def _encode(base: Base, images: Sequence[Image.Image]) -> Tensor:
    pixels = [to_pixels(image, base.resolution) for image in images]
    return torch.cat([base.encode_images(torch.stack(list(part))) for part in _chunks(pixels)])


def _chunks(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[at : at + _TOGETHER] for at in range(0, len(items), _TOGETHER)]


def photo_shots(base: Base, photos: Sequence[Photo], prompt: str, background: float = 1.0) -> Shots:
    """Encodes a person's photos once; no flips, which would move a mole to the other cheek.

    Args:
        base: encodes and names the class.
        photos: of one person.
        prompt: caption of photos without one of their own.
        background: weight of the loss outside the face.
    """
    images = [photo.open() for photo in photos]
    captions = tuple(base.prompt(photo.caption or prompt) for photo in photos)
    warn_unnamed(base, captions)
    landmarks = tuple(_landmarks(photo, image) for photo, image in zip(photos, images, strict=True))
    return Shots(_encode(base, images), captions, background=background, landmarks=landmarks)


def _landmarks(photo: Photo, image: Image.Image) -> Landmarks | None:
    """A photo's landmarks in sides of its centre square, checked."""
    if photo.landmarks is None:
        return None
    try:
        check_face(photo.landmarks, *image.size)
    except InputError as error:
        raise InputError(f"{photo.path}: {error}") from None
    return in_square(photo.landmarks, *image.size)


def class_shots(base: Base, prompt: str, count: int, seed: int, weight: float, sample: ClassSampler) -> Shots:
    """Pictures of the class by the bare base (DreamBooth's prior preservation), drawn once for all runs.

    They stay as PNG files in a folder of base, prompt and seed in `cache_home`.

    Args:
        base: encodes them.
        prompt: without the trigger; `{class_word}` is the base's.
        count: how many.
        seed: picture k is drawn from (seed, k) alone: an interrupted cache, or a smaller one, is completed.
        weight: of their loss, against 1 for the person's.
        sample: draws them.
    """
    caption = base.prompt(prompt)
    folder = cache_home() / "class" / _class_key(base, caption, seed)
    images = _kept(folder, count)
    missing = [k for k in range(count) if k not in images]
    with Progress("class images", count, len(images)) as bar:
        for part in _chunks(missing):
            made = sample([caption] * len(part), [_class_seed(seed, k) for k in part])
            for k, image in zip(part, made, strict=True):
                images[k] = image
                _keep(image, folder / f"{k:05d}.png")
            bar.update(len(part))
    return Shots(_encode(base, [images[k] for k in range(count)]), (caption,) * count, weight)


def _class_key(base: Base, caption: str, seed: int) -> str:
    """Names what the pictures depend on, so that those of another base are never taken for this one's."""
    pipe = base.pipe
    scheduler = {name: fact for name, fact in pipe.scheduler.config.items() if not name.startswith("_")}
    facts = (
        encoder_key(base.fingerprint, pipe.vae), type(pipe.scheduler).__name__, sorted(scheduler.items()),
        sorted(name for name, part in pipe.components.items() if part is not None),  # some can be left out
        base.resolution, caption, seed, _CLASS_FORMAT,
    )  # fmt: skip
    return _digest(facts)


def _class_seed(seed: int, k: int) -> int:
    return int(torch.randint(2**31, (), generator=rng(seed, "class", k)))


def _kept(folder: Path, count: int) -> dict[int, Image.Image]:
    """The class images that an earlier run has drawn; a damaged one is drawn again."""
    found: dict[int, Image.Image] = {}
    for k in range(count):
        with suppress(InputError):
            found[k] = open_photo(folder / f"{k:05d}.png")
    return found


def _keep(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        image.save(part, format="PNG")


def shots_of(
    base: Base, people: Sequence[Photos], config: TrainConfig, sample: ClassSampler | None
) -> tuple[list[list[Shots]], list[list[Shots]]]:
    """What each person is trained on, and what tells when `auto` stops.

    Returns:
        Photos and, with prior preservation, the class's images; and the photo that is left out of them where
        a person has several, else the only one (no such thing unless steps are `auto`).
    """
    shots = [photo_shots(base, photos, config.prompt, config.background) for photos in people]
    judged = [[one.part(-1, None)] for one in shots] if config.steps == "auto" else []
    if judged:
        shots = [one.part(0, -1) if len(one.captions) > 1 else one for one in shots]
    if config.prior_weight == 0:
        return [[person] for person in shots], judged
    if sample is None:
        raise ValueError("prior_weight > 0 needs `sample`, which makes the class images")
    count, weight = config.prior_images, config.prior_weight
    shared = class_shots(base, config.prior_prompt, count, config.seed, weight, sample)
    return [[person, shared] for person in shots], judged


def inputs_of(base: Base, people: Sequence[Photos], config: TrainConfig) -> dict[str, str]:
    """Names all that a training is fed besides its config: a run folder of others is refused."""
    named = [
        sorted(((photo.hash(), photo) for photo in photos), key=lambda pair: pair[0]) for photos in people
    ]
    shown = [photo for photos in named for _, photo in photos]
    return {
        **base.run_inputs,
        "photos": ";".join(",".join(name[:12] for name, _ in photos) for photos in named),
        "captions": _digest([base.prompt(photo.caption or config.prompt) for photo in shown]),
        "landmarks": _digest([photo.landmarks for photo in shown]),
    }


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
