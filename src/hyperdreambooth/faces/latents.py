"""Latents of photos, computed once: training reads a photo hundreds of times, the encoder never changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.cache import cached_rows
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError

FORMAT = 2  # raise it when open_photo or to_pixels change


def encoder_key(fingerprint: str, encoder: nn.Module) -> str:
    """What latents depend on besides the photo and its size: the base, and its encoder's weights and config.

    Args:
        fingerprint: of the base, whose own covers the parts that adapters change and no others.
        encoder: the VAE.
    """
    facts: dict[str, Any] = dict(getattr(encoder, "config", {}))
    told = {name: value for name, value in facts.items() if not name.startswith("_")}  # paths, versions
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{fingerprint}-{digest.hexdigest()[:16]}"


def cached_latents(
    photos: Sequence[Photo],
    size: int,
    encode: Callable[[Tensor], Tensor],
    cache: Path,
    key: str,
    batch: int = 32,
) -> Tensor:
    """The latents of photos, read from the cache or encoded and added to it.

    Args:
        photos: ``m`` photos.
        size: pixels a side they are encoded at.
        encode: pixels ``(b, 3, size, size)`` in [-1, 1] → latents ``(b, c, h, w)``.
        cache: a folder, made when missing; it may serve many bases and sizes.
        key: `encoder_key`; with the size and the photo's content it decides what is looked up.
        batch: photos encoded at a time.

    Returns:
        Latents ``(m, c, h, w)`` on the CPU.

    Raises:
        InputError: no photos, a broken photo (named), or an encoder that gives NaN.
    """
    if not photos:
        raise InputError("no photo to encode")

    def make(places: list[int]) -> dict[str, Tensor]:
        chosen = [photos[place] for place in places]
        pixels = torch.stack([to_pixels(photo.open(), size) for photo in chosen])
        with torch.no_grad():
            latents = encode(pixels)
        for photo, latent in zip(chosen, latents, strict=True):
            if not latent.isfinite().all():
                raise InputError(f"{photo.path}: the base's encoder gives NaN; load the base in float32")
        return {"latents": latents}

    names = [photo.hash() for photo in photos]
    return cached_rows(names, make, cache / f"{key}-{size}-{FORMAT}", batch, "encode photos")["latents"]
