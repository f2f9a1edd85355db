"""What the loop is fed: photos as latents, features and tokens, and who is drawn at a step.

All draws are pure functions of (seed, purpose, step, slot in the global batch): a resumed run, or one on more
processes, sees the same people, photos, noise and timesteps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth.base.denoise import Weighting, denoise_loss, draw_noise
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.load import Base
from hyperdreambooth.cache import cached_rows
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.latents import cached_latents, encoder_key
from hyperdreambooth.hypernet.encoder import Encoder, cached_features
from hyperdreambooth.runs import draw


class Captions:
    """What the photos say; encoded once where the text encoders wear nothing.

    Args:
        base: tokenizes and encodes.
        texts: a caption for each photo; many photos share one.
        cache: folder of what was encoded before.
    """

    def __init__(self, base: Base, texts: Sequence[str], cache: Path) -> None:
        known = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        self._base, self._cache, self._rows = base, cache, [known[text] for text in texts]
        self._tokens = base.tokenize(list(known)).cpu()
        self._once: Conditioning | None = None

    def __call__(self, photos: Sequence[int]) -> Conditioning:
        """The conditioning of some photos' captions, each read by what its own sample wears."""
        base, rows = self._base, [self._rows[photo] for photo in photos]
        if any(getattr(base.components[part], "peft_config", None) for part in base.family.TEXT_ENCODERS):
            return base.encode_prompts(self._tokens[rows])
        self._once = self._once or self._encoded()
        return {name: tensor[rows].to(base.device) for name, tensor in self._once.items()}

    def _encoded(self) -> Conditioning:
        """The conditioning of all captions, in the precision of the moment: training is all of one."""
        base, kind = self._base, self._base.device.type

        def make(places: list[int]) -> Conditioning:
            with torch.no_grad():
                return base.encode_prompts(self._tokens[places])

        parts = sorted(name for name, part in base.pipe.components.items() if part is not None)
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
        facts = repr((base.fingerprint, parts, base.dtype, precision))
        folder = self._cache / f"conditioning-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        names = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:32] for row in self._tokens]
        return cached_rows(names, make, folder, title="encode captions")


@dataclass(frozen=True)
class Faces:
    """Everybody's photos, encoded once.

    Attributes:
        names: the identities.
        photos: of all of them, identity by identity.
        offsets: identity `k` owns photos `offsets[k]` to `offsets[k + 1]`.
        features: `(m, t, c)` float16, for reference photos.
        latents: `(m, c, h, w)`, for target photos.
        captions: what the photos say.
    """

    names: tuple[str, ...]
    photos: tuple[Photo, ...]
    offsets: tuple[int, ...]
    features: Tensor
    latents: Tensor
    captions: Captions

    def rows(self, identity: int) -> range:
        """The photos of one identity."""
        return range(self.offsets[identity], self.offsets[identity + 1])


@dataclass(frozen=True)
class Slot:
    """One place in a batch: who, from which photo, which photos to denoise, and what names their noise."""

    identity: int
    reference: int
    targets: tuple[int, ...]
    key: tuple[int | str, ...]


@dataclass(frozen=True)
class Batch:
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
    people: dict[str, tuple[Photo, ...]], base: Base, encoder: Encoder, prompt: str, cache: Path
) -> Faces:  # fmt: skip
    """Encodes all photos, or finds them encoded in `cache`.

    Args:
        people: identity → photos.
        base: gives latents, and reads captions.
        encoder: gives features.
        prompt: caption of photos without one; `{class_word}` is filled in.
        cache: folder of the encoded photos.
    """
    photos = tuple(photo for group in people.values() for photo in group)
    offsets = [0]
    for group in people.values():
        offsets.append(offsets[-1] + len(group))
    usual = prompt.replace("{class_word}", base.class_word)
    captions = Captions(base, [photo.caption or usual for photo in photos], cache)
    key = encoder_key(base.fingerprint, base.pipe.vae)
    latents = cached_latents(photos, base.resolution, base.encode_images, cache, key)
    features = cached_features(photos, base.resolution, encoder, cache)
    return Faces(tuple(people), photos, tuple(offsets), features, latents, captions)


def hold_out(count: int, held: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits identities into (trained, held out): a draw of the seed, at most a quarter held out."""
    order = torch.randperm(count, generator=draw(seed, "held out")).tolist()
    held = min(held, count // 4)
    return sorted(order[held:]), sorted(order[:held])


def pick(faces: Faces, pools: Sequence[Sequence[int]], share: float, photos: int, *key: int | str) -> Slot:
    """Draws who fills a slot, and which photos of theirs.

    The reference is never its own target where the identity has another photo: else the network copies pose
    and light (METHOD 3.5).

    Args:
        faces: everybody.
        pools: identities; with two pools, `share` is how often the second one is drawn from.
        share: between 0 and 1.
        photos: targets.
        key: names the draw.
    """
    generator = draw(*key)
    second = float(torch.rand((), generator=generator)) < share
    pool = pools[-1] if second else pools[0]
    identity = pool[int(torch.randint(len(pool), (), generator=generator))]
    rows = faces.rows(identity)
    order = [rows[k] for k in torch.randperm(len(rows), generator=generator).tolist()]
    others = order[1:] or order
    targets = tuple(others[k % len(others)] for k in range(photos))
    return Slot(identity, order[0], targets, key)


def collect(base: Base, faces: Faces, slots: Sequence[Slot], offset_noise: float = 0.0) -> Batch:
    """The tensors of some slots; noise and timestep of each target are named by its slot's key."""
    targets = [(row, slot.key, k) for slot in slots for k, row in enumerate(slot.targets)]
    shape, rows = tuple(faces.latents.shape[1:]), [row for row, _, _ in targets]
    drawn = [draw_noise(base, shape, *key, "noise", k, offset=offset_noise) for _, key, k in targets]
    return Batch(
        identities=tuple(slot.identity for slot in slots),
        features=faces.features[[slot.reference for slot in slots]].to(base.device, torch.float32),
        latents=faces.latents[rows].to(base.device),
        noise=torch.stack([noise for noise, _ in drawn]),
        timesteps=torch.stack([timestep for _, timestep in drawn]),
        told=partial(faces.captions, rows),
    )


def person_losses(base: Base, batch: Batch, weighting: Weighting = "uniform") -> Tensor:
    """The denoising loss of every person `(n,)`, the base in what it wears now; mean over their targets."""
    noisy = (batch.latents, batch.told(), batch.noise, batch.timesteps)
    losses = denoise_loss(base, *noisy, weighting=weighting)
    return losses.view(len(batch.identities), -1).mean(1)
