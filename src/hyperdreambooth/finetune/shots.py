"""What the loop is fed: latents and captions of the person and, for prior preservation, of the class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.base.sd import Conditioning
from hyperdreambooth.faces.align import face_oval, open_photo, to_pixels
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import whole_file

Sample: TypeAlias = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""Prompts and a seed for each → a picture each."""

T = TypeVar("T")
_TOGETHER = 8  # pictures encoded or drawn in one call


@dataclass(frozen=True)
class Shots:
    """Latents `(m, c, h, w)` on the base's device, their captions, and how their loss counts.

    Attributes:
        latents: `(m, c, h, w)` on the base's device.
        captions: a caption each.
        weight: of their loss, against 1 for a person's photos.
        background: weight of the loss outside the oval of the face; 1 for all of the picture alike.
    """

    latents: Tensor
    captions: tuple[str, ...]
    weight: float = 1.0
    background: float = 1.0

    def mask(self) -> Tensor:
        """Weights `(1, h, w)` of the loss."""
        oval = face_oval(*self.latents.shape[-2:]).to(self.latents.device)
        return (self.background + (1 - self.background) * oval)[None]


def _caption(base: Base, text: str) -> str:
    return base.prompt(text.replace("{class_word}", base.class_word))


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
    latents = _encode(base, [open_photo(photo.path) for photo in photos])
    captions = tuple(_caption(base, photo.caption or prompt) for photo in photos)
    return Shots(latents, captions, background=background)


def class_shots(
    base: Base, prompt: str, count: int, seed: int, weight: float, sample: Sample, folder: Path | None
) -> Shots:
    """Pictures of the class by the bare base (DreamBooth's prior preservation).

    Args:
        base: encodes them.
        prompt: without the trigger; `{class_word}` is the base's.
        count: how many.
        seed: picture k is drawn from (seed, k) alone, so an interrupted cache is completed, not redone.
        weight: of their loss, against 1 for the person's.
        sample: draws them.
        folder: keeps them as PNG files; None to keep them in memory only.
    """
    caption = _caption(base, prompt)
    images = _kept(folder, count)
    missing = [k for k in range(count) if k not in images]
    with Progress("class images", count, len(images)) as bar:
        for part in _chunks(missing):
            made = sample([caption] * len(part), [seed * count + k for k in part])
            for k, image in zip(part, made, strict=True):
                images[k] = image
                if folder is not None:
                    _keep(image, folder / f"{k:05d}.png")
            bar.update(len(part))
    return Shots(_encode(base, [images[k] for k in range(count)]), (caption,) * count, weight)


def _kept(folder: Path | None, count: int) -> dict[int, Image.Image]:
    """The class images that an earlier run has drawn."""
    files = {k: folder / f"{k:05d}.png" for k in range(count)} if folder is not None else {}
    return {k: open_photo(file) for k, file in files.items() if file.is_file()}


def _keep(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        image.save(part, format="PNG")


class Conditioner:
    """Captions → conditioning, encoded once where the text encoder wears nothing.

    Args:
        base: tokenizes and encodes.
        captions: all that will be asked for.
        text_worn: whether the text encoder wears what is trained; if not, everything is encoded now, once.
    """

    def __init__(self, base: Base, captions: Sequence[str], text_worn: bool) -> None:
        self.base, self.known = base, sorted(set(captions))
        self.tokens = base.tokenize(self.known)
        with torch.no_grad():
            self.once = None if text_worn else base.encode_prompts(self.tokens)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of `b` captions, each read by what its own sample wears."""
        rows = [self.known.index(caption) for caption in captions]
        if self.once is None:
            return self.base.encode_prompts(self.tokens[rows])
        return {name: tensor[rows] for name, tensor in self.once.items()}
