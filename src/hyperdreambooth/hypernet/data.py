"""What the loop is fed: photos as latents, features and tokens, and who is drawn at a step.

All draws are pure functions of (seed, purpose, step, slot in the global batch): a resumed run, or one on more
processes, sees the same people, photos, noise and timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth.base.conditioning import Conditioner, warn_unnamed
from hyperdreambooth.base.denoise import Weighting, denoise_loss, sample_noise
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.latents import cached_latents, encoder_key
from hyperdreambooth.hypernet.encoder import Encoder, cached_features
from hyperdreambooth.runs import rng


@dataclass(frozen=True)
class Faces:
    """Everybody's photos, encoded once.

    Attributes:
        names: the identities.
        photos: of all of them, identity by identity.
        offsets: identity `k` owns photos `offsets[k]` to `offsets[k + 1]`.
        features: `(m, t, c)` float16, for reference photos.
        latents: `(m, c, h, w)`, for target photos.
        captions: `m`, what the photos say.
        told: captions → conditioning.
    """

    names: tuple[str, ...]
    photos: tuple[Photo, ...]
    offsets: tuple[int, ...]
    features: Tensor
    latents: Tensor
    captions: tuple[str, ...]
    told: Conditioner

    def rows(self, identity: int) -> range:
        """The photos of one identity."""
        return range(self.offsets[identity], self.offsets[identity + 1])


@dataclass(frozen=True)
class Example:
    """One place in a batch: who, from which photo, which photos to denoise, and what names their noise."""

    identity: int
    reference: int
    targets: tuple[int, ...]
    key: tuple[int | str, ...]


@dataclass(frozen=True)
class TrainingBatch:
    """Slots as tensors on the base's device, identity-major: `b = n · photos`.

    Attributes:
        identities: who they are.
        features: `(n, t, c)` of the reference photos.
        latents, noise: `(b, c, h, w)`.
        timesteps: `(b,)`.
        told: the captions' conditioning, by what the base wears when it is asked for.
    """

    identities: tuple[int, ...]
    features: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    told: Callable[[], Conditioning]


def load_faces(
    people: dict[str, tuple[Photo, ...]], base: Base, encoder: Encoder, prompt: str, cache: Path,
    text_worn: bool,
) -> Faces:  # fmt: skip
    """Encodes all photos, or finds them encoded in `cache`.

    Args:
        people: identity → photos.
        base: gives latents, and reads captions.
        encoder: gives features.
        prompt: caption of photos without one; `{class_word}` is the base's.
        cache: folder of the encoded photos and captions.
        text_worn: whether the text encoders wear what is trained.
    """
    photos = tuple(photo for group in people.values() for photo in group)
    offsets = [0]
    for group in people.values():
        offsets.append(offsets[-1] + len(group))
    captions = tuple(base.prompt(photo.caption or prompt) for photo in photos)
    warn_unnamed(base, captions)
    told = Conditioner(base, captions, text_worn, cache)
    key = encoder_key(base.fingerprint, base.pipe.vae)
    latents = cached_latents(photos, base.resolution, base.encode_images, cache, key)
    features = cached_features(photos, base.resolution, encoder, cache)
    return Faces(tuple(people), photos, tuple(offsets), features, latents, captions, told)


def hold_out(count: int, held: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits identities into (trained, held out): a draw of the seed, at most a quarter held out."""
    order = torch.randperm(count, generator=rng(seed, "held out")).tolist()
    held = min(held, count // 4)
    return sorted(order[held:]), sorted(order[:held])


def pick(faces: Faces, pools: Sequence[Sequence[int]], share: float, photos: int, *key: int | str) -> Example:
    """Draws who fills a slot, and which photos of theirs.

    The reference is never its own target where the identity has another photo: else the network copies pose
    and light (training.md 5).

    Args:
        faces: everybody.
        pools: identities; with two pools, `share` is how often the second one is drawn from.
        share: between 0 and 1.
        photos: targets.
        key: names the draw.
    """
    generator = rng(*key)
    second = float(torch.rand((), generator=generator)) < share
    pool = pools[-1] if second else pools[0]
    identity = pool[int(torch.randint(len(pool), (), generator=generator))]
    rows = faces.rows(identity)
    order = [rows[k] for k in torch.randperm(len(rows), generator=generator).tolist()]
    others = order[1:] or order
    targets = tuple(others[k % len(others)] for k in range(photos))
    return Example(identity, order[0], targets, key)


def collect(base: Base, faces: Faces, slots: Sequence[Example], bias: int = 1) -> TrainingBatch:
    """The tensors of some slots; noise and timestep of each target are named by its slot's key."""
    targets = [(row, slot.key, k) for slot in slots for k, row in enumerate(slot.targets)]
    shape, rows = tuple(faces.latents.shape[1:]), [row for row, _, _ in targets]
    drawn = [sample_noise(base, shape, *key, "noise", k, bias=bias) for _, key, k in targets]
    return TrainingBatch(
        identities=tuple(slot.identity for slot in slots),
        features=faces.features[[slot.reference for slot in slots]].to(base.device, torch.float32),
        latents=faces.latents[rows].to(base.device),
        noise=torch.stack([noise for noise, _ in drawn]),
        timesteps=torch.stack([timestep for _, timestep in drawn]),
        told=partial(faces.told, [faces.captions[row] for row in rows]),
    )


def person_losses(base: Base, batch: TrainingBatch, weighting: Weighting = "uniform") -> Tensor:
    """The denoising loss of every person `(n,)`, the base in what it wears now; mean over their targets."""
    noisy = (batch.latents, batch.told(), batch.noise, batch.timesteps)
    losses = denoise_loss(base, *noisy, weighting=weighting)
    return losses.view(len(batch.identities), -1).mean(1)
