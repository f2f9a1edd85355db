"""The data of the training loop: photos as latents and features, captions, and the examples of each step.

Random draws are pure functions of (seed, purpose, step, place in the batch), on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth.base.conditioning import Conditioner, class_caption, warn_captions
from hyperdreambooth.base.config import LossConfig
from hyperdreambooth.base.denoise import Key, sampled_loss
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.load import Base
from hyperdreambooth.captured import sent
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.frame import photo_masks
from hyperdreambooth.faces.latents import cached_photos, encoder_key
from hyperdreambooth.hypernet.encoder import Encoder
from hyperdreambooth.hypernet.familiar import Familiar, familiar_of
from hyperdreambooth.runs import rng
from hyperdreambooth.storage import Store

EVERY = 4
"""With a `class_weight`, one example without a person's name for so many people of a batch."""


@dataclass(frozen=True)
class Faces:
    """The `m` photos of all identities, encoded once, one identity after the other."""

    names: tuple[str, ...]
    photos: tuple[Photo, ...]
    offsets: tuple[int, ...]  # identity `k` owns photos `offsets[k]` to `offsets[k + 1]`
    features: Tensor  # `(m, t, c)` float16, for reference photos
    latents: Tensor  # `(m, c, h, w)`, for target photos
    textures: Tensor  # `(m, k)`, see `familiar.py`
    captions: tuple[str, ...]
    conditioner: Conditioner
    class_captions: tuple[str, ...] = ()  # which name the class and not the person; empty where nobody asks
    masks: Tensor | None = None  # `(m, 1, h, w)`, of what `prepare` has not padded; None for all

    def rows(self, identity: int) -> range:
        """Returns the rows of one identity's photos."""
        return range(self.offsets[identity], self.offsets[identity + 1])


@dataclass(frozen=True)
class Example:
    """One place in a batch: an identity, its reference photo, its target photos, the key of their noise.

    Of one that is not `named`, the targets have captions of the class, and nothing is predicted for it.
    """

    identity: int
    reference: int
    targets: tuple[int, ...]
    key: Key
    named: bool = True


@dataclass(frozen=True)
class TrainingBatch:
    """Examples as tensors on the base's device, one after the other: `b = examples · photos`."""

    identities: tuple[int, ...]  # of the `n` named examples, which come first
    features: Tensor  # `(n, t, c)` of their reference photos
    latents: Tensor  # `(b, c, h, w)` of all target photos
    keys: tuple[Key, ...]  # of the draws of noise and timestep
    conditioning: Callable[[], Conditioning]  # encodes the captions with what the base wears at that moment
    photos: int  # targets of each example
    masks: Tensor | None = None  # `(b, 1, h, w)` of the target photos


def load_faces(
    people: dict[str, tuple[Photo, ...]], base: Base, encoder: Encoder, prompt: str,
    cache: Path | Store, text_worn: bool, classes: bool = False,
) -> Faces:  # fmt: skip
    """Encodes all photos, or reads them from the cache. Each photo is decoded once for latents and features.

    The encoder sees pixels at the base's resolution, as in a prediction. `prompt` is the caption of photos
    without one, `text_worn` says whether the text encoders wear what is trained, and `classes` whether there
    will be examples without the person's name.
    """
    photos = tuple(chain.from_iterable(people.values()))
    offsets = tuple(accumulate(map(len, people.values()), initial=0))
    captions = tuple(base.prompt(photo.caption or prompt) for photo in photos)
    warn_captions(base, captions, [photo.path for photo in photos])

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        features = {"features": encoder(pixels).half(), "textures": encoder.texture(pixels)}
        return {"latents": base.encode_images(pixels), **features}

    key = f"{encoder_key(base.fingerprint, base.pipe.vae)}-{encoder.fingerprint}-textures"
    encoded = cached_photos(photos, base.resolution, encode, cache, key)
    unnamed = tuple(class_caption(base, caption) for caption in captions if classes)
    conditioner = Conditioner(base, [*captions, *unnamed], text_worn, cache)
    masks = photo_masks([photo.corners for photo in photos], encoded["latents"])
    return Faces(
        tuple(people), photos, offsets, captions=captions, conditioner=conditioner, class_captions=unnamed,
        masks=masks, **encoded,
    )  # fmt: skip


def hold_out(count: int, held: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits identities into (trained, held out) by a draw of the seed; at most a quarter is held out."""
    order = torch.randperm(count, generator=rng(seed, "held out")).tolist()
    held = min(held, count // 4)
    return sorted(order[held:]), sorted(order[:held])


def familiar_faces(faces: Faces) -> Familiar | None:
    """Describes the photos of three quarters of the people; those of the others set the limit."""
    every = [faces.textures[faces.offsets[k] : faces.offsets[k + 1]] for k in range(len(faces.names))]
    others = every[3::4]
    described = [rows for k, rows in enumerate(every) if k % 4 != 3]
    return familiar_of(torch.cat(described), torch.cat(others)) if others else None


def pick(faces: Faces, pool: Sequence[int], photos: int, *key: int | str) -> Example:
    """Draws an identity of the pool, a reference photo and target photos; `key` is the name of the draw.

    The reference is never its own target if the identity has another photo. Otherwise the network would copy
    pose and light (training.md 5).
    """
    generator = rng(*key)
    identity = pool[int(torch.randint(len(pool), (), generator=generator))]
    rows = faces.rows(identity)
    order = [rows[k] for k in torch.randperm(len(rows), generator=generator).tolist()]
    others = order[1:] or order
    return Example(identity, order[0], tuple(others[k % len(others)] for k in range(photos)), key)


def anybody(
    faces: Faces, pool: Sequence[int], photos: int, seed: int, step: int, places: Sequence[int]
) -> list[Example]:
    """Draws the examples of a step that name the class and not a person, one for every `EVERY`th place.

    Whose photos they show makes no difference: the class names anybody.
    """
    return [
        replace(pick(faces, pool, photos, seed, "class", step, k), named=False)
        for k in places
        if k % EVERY == 0
    ]


def collect(base: Base, faces: Faces, examples: Sequence[Example]) -> TrainingBatch:
    """Returns the tensors of some examples, the named ones first.

    The host waits for no device, so the next step's are drawn and sent while the GPU computes this one's.
    """
    rows = [row for example in examples for row in example.targets]
    captions = [
        (faces.captions if example.named else faces.class_captions)[row]
        for example in examples
        for row in example.targets
    ]
    named = [example for example in examples if example.named]
    return TrainingBatch(
        identities=tuple(example.identity for example in named),
        features=sent(faces.features[[example.reference for example in named]], base.device).float(),
        latents=sent(faces.latents[rows], base.device),
        keys=tuple((*one.key, "noise", k) for one in examples for k in range(len(one.targets))),
        conditioning=partial(faces.conditioner, captions, len(examples[0].targets)),
        photos=len(examples[0].targets),
        masks=None if faces.masks is None else sent(faces.masks[rows], base.device),
    )


def person_losses(
    base: Base, batch: TrainingBatch, config: LossConfig, answers: Tensor | None = None
) -> Tensor:
    """Returns each example's denoising loss, the mean over its targets, as the base is worn now.

    Of the examples without a person's name, the last ones, `answers` are wanted.
    """
    samples = (base, batch.latents, batch.keys, batch.conditioning(), config)
    losses = sampled_loss(*samples, batch.masks, answers)
    return losses.view(-1, batch.photos).mean(1)
