"""What the loop trains on: latents, captions and masks of each person's photos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.base.conditioning import class_caption, warn_captions
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.frame import photo_masks
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.faces.landmarks import Landmarks, check_face, face_oval, in_square
from hyperdreambooth.faces.latents import cached_photos, encoder_key
from hyperdreambooth.files import InputError
from hyperdreambooth.storage import Store
from hyperdreambooth.training.config import TrainConfig

_TOGETHER = 8  # images encoded in one call


@dataclass(frozen=True)
class Shots:
    """Images of one kind, a person's photos or the class images, ready to be trained on.

    Attributes:
        latents: `(m, c, h, w)` on the base's device.
        captions: a caption for each.
        person: the name of the person in the keys of random draws, see `person_key`.
        weight: the weight of their loss, against 1 for a person's photos.
        masks: the weights of the pixels `(m, 1, h, w)`; None for all ones.
        answered: whether a step takes the bare base's answers to their captions and not the images, see
            `as_class`.
    """

    latents: Tensor
    captions: tuple[str, ...]
    person: str = ""
    weight: float = 1.0
    masks: Tensor | None = None
    answered: bool = False

    def part(self, first: int, end: int | None) -> Shots:
        """Returns the images from `first` to `end`."""
        masks = None if self.masks is None else self.masks[first:end]
        own = slice(first, end)
        return replace(self, latents=self.latents[own], captions=self.captions[own], masks=masks)


def encode_all(base: Base, images: Sequence[Image.Image]) -> Tensor:
    """Returns the latents `(m, c, h, w)` of images; no flips, which would move a mole to the other cheek."""
    pixels = torch.stack([to_pixels(image, base.resolution) for image in images])
    return torch.cat([base.encode_images(part) for part in pixels.split(_TOGETHER)])


def person_key(photos: Sequence[Photo]) -> str:
    """Returns the name of a person in the keys of random draws: a hash of the content of the photos.

    So what a person is trained with depends on the photos alone, not on file names or the rest of the batch.
    """
    return digest(sorted(photo.hash() for photo in photos))


def photo_shots(
    base: Base,
    photos: Sequence[Photo],
    prompt: str,
    background: float = 1.0,
    latents: Tensor | None = None,
) -> Shots:
    """Returns a person's photos as the loop needs them; each photo is encoded once.

    What `prepare` padded has no weight in the loss.

    Args:
        base: the base that encodes the photos and names the class.
        photos: the photos of one person.
        prompt: the caption of photos that have none.
        background: the weight of the loss outside the face.
        latents: the photos' latents `(m, c, h, w)` where they are known already.

    Raises:
        InputError: an unreadable photo, or landmarks that make no face.
    """
    images = [photo.open() if latents is None or photo.landmarks else None for photo in photos]
    points = [image and _landmarks(photo, image) for photo, image in zip(photos, images, strict=True)]
    if latents is None:
        latents = encode_all(base, [image for image in images if image is not None])
    masks = photo_masks([photo.corners for photo in photos], latents)
    if background != 1:
        height, width = latents.shape[-2:]
        ovals = torch.stack([face_oval(height, width, face) for face in points]).to(latents.device)
        ovals = (background + (1 - background) * ovals)[:, None]
        masks = ovals if masks is None else masks * ovals
    captions = tuple(base.prompt(photo.caption or prompt) for photo in photos)
    return Shots(latents, captions, person_key(photos), masks=masks)


def as_class(shots: Shots, base: Base, config: TrainConfig) -> list[Shots]:
    """Returns a person's photos again, with captions that name the class; none without a `class_weight`.

    A step takes one of the bare base's answers to these captions for each person, whatever its `batch` (see
    `answers.py`). An answer is right everywhere, so padding and background count as well.
    """
    if config.class_weight == 0:
        return []
    captions = tuple(class_caption(base, caption) for caption in shots.captions)
    weight = config.class_weight * config.batch  # against the mean over the photos of a step
    return [replace(shots, captions=captions, weight=weight, masks=None, answered=True)]


def _landmarks(photo: Photo, image: Image.Image) -> Landmarks | None:
    """Returns a photo's landmarks in sides of its centre square, checked."""
    if photo.landmarks is None:
        return None
    try:
        check_face(photo.landmarks, *image.size)
    except InputError as error:
        raise InputError(f"{photo.path}: {error}") from None
    return in_square(photo.landmarks, *image.size)


def shots_of(
    base: Base,
    people: Sequence[Sequence[Photo]],
    config: TrainConfig,
    prior: Sequence[Shots] = (),
    cache: Path | Store | None = None,
) -> tuple[list[list[Shots]], list[list[Shots]]]:
    """Prepares the photos of people for training.

    Args:
        base: the base that encodes the photos.
        people: the photos of each person.
        config: the caption, the background and the number of steps.
        prior: the class images, see `class_images.class_shots`.
        cache: a folder that keeps the latents; None to keep none.

    Returns:
        What each person is trained on, and what each person is judged on where `steps` is `auto`: the last of
        several photos, which is then left out of the training, or the only one.
    """
    parts: Sequence[Tensor | None] = [None] * len(people)
    if cache is not None:
        photos, key = [photo for one in people for photo in one], encoder_key(base.fingerprint, base.pipe.vae)
        rows = cached_photos(
            photos, base.resolution, lambda x: {"latents": base.encode_images(x)}, cache, key
        )
        parts = rows["latents"].to(base.device).split([len(one) for one in people])
    shots = [
        photo_shots(base, photos, config.prompt, config.background, part)
        for photos, part in zip(people, parts, strict=True)
    ]
    names = [photo.path for photos in people for photo in photos]
    warn_captions(base, [caption for one in shots for caption in one.captions], names)
    judged = [[one.part(-1, None)] for one in shots] if config.steps == "auto" else []
    if judged:
        shots = [one.part(0, -1) if len(one.captions) > 1 else one for one in shots]
    return [[one, *prior, *as_class(one, base, config)] for one in shots], judged


def inputs_of(base: Base, people: Sequence[Sequence[Photo]], config: TrainConfig) -> dict[str, str]:
    """Returns the fingerprints of all inputs of a training besides its config; a run folder compares them."""
    hashed = [
        sorted(((photo.hash(), photo) for photo in photos), key=lambda pair: pair[0]) for photos in people
    ]
    ordered = [photo for photos in hashed for _, photo in photos]
    return {
        **base.run_inputs,
        "photos": ";".join(",".join(name[:12] for name, _ in photos) for photos in hashed),
        "captions": digest([base.prompt(photo.caption or config.prompt) for photo in ordered]),
        "landmarks": digest([(photo.landmarks, photo.corners) for photo in ordered]),
    }


def digest(value: object) -> str:
    """Returns sixteen hex digits of the repr of plain data."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
