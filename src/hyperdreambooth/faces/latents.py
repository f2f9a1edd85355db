"""Latents of photos, computed once: training reads a photo hundreds of times, and the encoder never changes.

A cache folder holds shards of a batch each, in which a tensor is named by its photo's content. Shards appear
whole and are never changed, so any number of processes may fill one cache, and a killed one loses a batch.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperdreambooth.faces.align import open_photo, to_pixels
from hyperdreambooth.faces.dataset import Photo, photo_hash
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import InputError, save_tensors

FORMAT = 1  # raise it when open_photo, to_pixels or the shards change


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
        key: fingerprint of the base; with the size and the photo's content it decides what is looked up.
        batch: photos encoded at a time.

    Returns:
        Latents ``(m, c, h, w)`` on the CPU.

    Raises:
        InputError: no photos, a broken photo (named), or an encoder that gives NaN.
    """
    if not photos:
        raise InputError("no photo to encode")
    folder = cache / f"{key}-{size}-{FORMAT}"
    names = [photo_hash(photo.path) for photo in photos]
    known = _look_up(folder, set(names))
    missing = {name: photo for name, photo in zip(names, photos, strict=True) if name not in known}
    if missing:
        known |= _encode(missing, size, encode, folder, batch)
    return torch.stack([known[name] for name in names])


def _look_up(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """What the shards have of these photos; an unreadable shard has nothing."""
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("[!.]*.safetensors")):
        with suppress(SafetensorError, OSError), safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in names and name not in found:
                    found[name] = file.get_tensor(name)
    return found


def _encode(
    missing: dict[str, Photo], size: int, encode: Callable[[Tensor], Tensor], folder: Path, batch: int
) -> dict[str, Tensor]:
    """Encode photos a batch at a time, each batch a shard."""
    names, done = list(missing), dict[str, Tensor]()
    with Progress("encode photos", len(names)) as bar:
        for start in range(0, len(names), batch):
            chunk = names[start : start + batch]
            pixels = torch.stack([to_pixels(open_photo(missing[name].path), size) for name in chunk])
            with torch.no_grad():
                latents = encode(pixels).detach().cpu()
            shard = dict(zip(chunk, latents, strict=True))
            for name, latent in shard.items():
                if not latent.isfinite().all():
                    where = missing[name].path
                    raise InputError(f"{where}: the base's encoder gives NaN; load the base in float32")
            save_tensors(folder / f"{uuid.uuid4().hex}.safetensors", shard)
            done |= shard
            bar.update(len(chunk))
    return done
