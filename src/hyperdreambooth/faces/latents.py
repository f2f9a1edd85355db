"""The outputs of frozen encoders for photos, computed once: a training reads each photo hundreds of times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.cache import Rows, cached_rows
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.storage import Store

FORMAT = 3  # raise it when open_photo or to_pixels change
_DECODER = ("decoder.", "post_quant_conv.")  # the parts of a VAE that latents of photos do not depend on


def encoder_key(fingerprint: str, vae: nn.Module, decodes: bool = False) -> str:
    """Returns the part of a cache folder's name for the base and its VAE, of which weights and config count.

    The base's fingerprint only covers the parts that adapters change.

    Args:
        fingerprint: of the base.
        vae: of the base.
        decodes: whether the decoder counts too, as it does for what the base has drawn.
    """
    config: dict[str, Any] = dict(getattr(vae, "config", {}))
    settings = {name: value for name, value in config.items() if not name.startswith("_")}  # no paths
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if decodes or not name.startswith(_DECODER):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{fingerprint}-{digest.hexdigest()[:16]}"


def cached_photos(
    photos: Sequence[Photo],
    size: int,
    encode: Callable[[Tensor], Rows],
    cache: Path | Store,
    key: str,
    batch: int = 32,
) -> Rows:
    """Returns what frozen encoders make of `m` photos, in `m` rows, read from the cache or added to it.

    Each missing photo is decoded once, however many tensors `encode` returns. Decoding needs threads and no
    processes: Pillow releases the interpreter's lock while it decodes and resizes.

    Args:
        photos: at least one.
        size: the side at which they are encoded, in pixels.
        encode: pixels `(b, 3, size, size)` in [-1, 1] → named tensors with `b` rows each.
        cache: the cache folder, created when missing; it may serve many encoders and sizes.
        key: a name for everything that `encode` depends on. Key, size and content decide on a row.
        batch: the number of photos encoded at a time.
    """
    if not photos:
        raise InputError("no photo to encode; expected at least one")

    @torch.no_grad()
    def encode_batch(places: list[int]) -> Rows:
        pixels = threads.map(lambda place: to_pixels(photos[place].open(), size), places)
        rows = encode(torch.stack(list(pixels)))
        for name, tensor in rows.items():
            for place, row in zip(places, tensor, strict=True):
                if not row.isfinite().all():
                    path, advice = photos[place].path, "load the base in float32"
                    raise InputError(f"{path}: the base's encoder gives NaN ({name}); {advice}")
        return rows

    names = [photo.hash() for photo in photos]
    with ThreadPoolExecutor() as threads:
        return cached_rows(names, encode_batch, cache / f"{key}-{size}-{FORMAT}", batch, "encode photos")
