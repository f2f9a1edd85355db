"""How well faces are drawn: a reader of evenness, and the networks' pictures of even and skewed faces.

Both networks judge a base from outside and ship with nothing. The reader is told what is even; the features
for distances (selfsup.py) learn from the same pictures without being told anything.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hyperdreambooth.avatars.build.autoencoder import through
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import (
    CHUNK,
    Pictures,
    complete,
    from_bytes,
    in_chunks,
    to_bytes,
    write_chunk,
)
from hyperdreambooth.avatars.build.readers import ShapeReader, blemish, people_and_pictures
from hyperdreambooth.avatars.draw.people import SPLITS, Context, Identity, identity, photo_context
from hyperdreambooth.avatars.draw.render import draw
from hyperdreambooth.avatars.draw.skew import PARTS, random_skew, skewed_parts
from hyperdreambooth.progress import Progress

EACH = 2  # pictures of a person: an even and a skewed face
LABELS = ["even", *(f"skewed:{part}" for part in PARTS)]
_SEEN, _CLEARLY = 20, 24  # a skew shows if so many pixels differ by so much in 0..255


class LooksConfig(BaseModel):
    """How the two networks are trained that judge how well a base draws.

    Attributes:
        evenness: of the reader.
        features: of the network for distances.
        held_out: validation people on whom the reader is measured.
    """

    model_config = ConfigDict(extra="forbid")
    evenness: StageConfig = StageConfig(
        steps=5000, batch=64, lr=1.5e-3, ema=0.99, people=8000, each=EACH, checkpoint_every=100
    )
    features: StageConfig = StageConfig(
        steps=600, batch=48, lr=2e-3, ema=0.99, people=4000, each=EACH, seed=1, checkpoint_every=100
    )
    held_out: int = 250


def faces(split: str, people: int, cache: Path, vae: Any, device: str) -> Pictures:
    """Returns an even and a skewed picture of each of the first people of a split, in this order.

    Both are of one context, so nothing but the skew tells them apart. The VAE softens those of every third
    person as it softens a base's pictures, the first person's included.

    Args:
        cache: folder of chunks, of this VAE only; the same call continues an interrupted one.
    """
    somebody = [identity(seed) for seed in SPLITS[split][:people]]
    shown = [(who, photo_context(who.seed, 0, album=False), skewed) for who in somebody for skewed in (0, 1)]
    crisp = in_chunks(shown, render, cache, f"{split}-crisp")
    files = [cache / f"{split}-faces-{k * CHUNK:07d}.npy" for k in range(len(crisp))]
    with Progress("through the VAE", len(files)) as bar:
        for k, (file, chunk) in enumerate(zip(files, crisp, strict=True)):
            if not complete(file, len(chunk)):
                soft = is_soft(torch.arange(k * CHUNK, k * CHUNK + len(chunk))).numpy()
                pixels = from_bytes(chunk[soft]).split(50)
                made = np.array(chunk)
                made[soft] = np.concatenate([to_bytes(through(vae, some.to(device))) for some in pixels])
                write_chunk(file, made)
            bar.update(1)
    maps = [np.load(file, mmap_mode="r") for file in files]
    return Pictures(maps, [who for who, _, _ in shown], [scene for _, scene, _ in shown], EACH)


def is_soft(rows: Tensor) -> Tensor:
    """Returns which rows of `faces` went through the VAE."""
    return rows // EACH % 3 == 0


def render(shown: tuple[Identity, Context, int]) -> Image.Image:
    """Draws a person's even or skewed face in a context; a skew is one that shows."""
    person, scene, skewed = shown
    even = draw(person, scene)
    if not skewed:
        return even
    pictures = (draw(person, scene, skew=random_skew(person, scene, attempt)) for attempt in count())
    return next(picture for picture in pictures if shows(even, picture))


def shows(even: Image.Image, skewed: Image.Image) -> bool:
    """Returns whether a skew can be seen: dim light, deep skin or a sketch may swallow a small one."""
    off = np.abs(np.asarray(even, dtype=int) - np.asarray(skewed, dtype=int)).max(axis=2)
    return int((off > _CLEARLY).sum()) >= _SEEN


def middle(pixels: Tensor) -> Tensor:
    """Returns the square of pixels `(b, 3, 128, 128)` in which every pose has its face, `(b, 3, 96, 96)`."""
    return pixels[..., 28:124, 16:112]


def new_evenness_reader(seed: int) -> ShapeReader:
    """Returns an untrained reader of `LABELS`; evenness is a matter of where things are."""
    return ShapeReader(len(LABELS), seed, side=96)


def read_evenness(reader: ShapeReader, pixels: Tensor) -> Tensor:
    """Returns the probabilities `(b, 1 + parts)` of `LABELS` for pixels `(b, 3, 128, 128)` in [-1, 1]."""
    return reader(middle(pixels)).float().sigmoid()


def targets(pictures: Pictures) -> Tensor:
    """Returns what is true of `faces`, `(m, 1 + parts)` in the order of `LABELS`, as 0 and 1."""
    rows: list[list[float]] = []
    for row, (person, scene) in enumerate(zip(pictures.identities, pictures.contexts, strict=True)):
        skewed = skewed_parts(person, scene) if row % 2 else ()
        rows.append([float(not skewed), *(float(part in skewed) for part in PARTS)])
    return torch.tensor(rows)


def train_evenness(pictures: Pictures, config: StageConfig, folder: Path, device: str) -> ShapeReader:
    """Trains the reader of evenness on `faces`: whether a face is even, and which parts of it are not.

    Half of the pictures are mirrored, and all are blemished like those of the scorers.
    """
    reader = new_evenness_reader(config.seed).to(device)
    truth = targets(pictures)

    def batch_of(step: int) -> Tensors:
        rows, generator = people_and_pictures(pictures, config, "evenness", step)
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        pixels = pictures.batch(rows)
        pixels = blemish(torch.where(mirrored, pixels.flip(3), pixels), generator)
        return {"pixels": middle(pixels), "truth": truth[rows]}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        logits = reader(batch["pixels"]).float()
        # Which part is off is easier to learn than that something is, and leads there.
        loss = binary_cross_entropy_with_logits(logits, batch["truth"], reduction="none").mean(dim=0)
        return {"loss": loss[0] + loss[1:].sum(), "even": loss[0], "parts": loss[1:].mean()}

    fit("reader: evenness", reader, batch_of, loss_of, config, folder, device)
    return reader
