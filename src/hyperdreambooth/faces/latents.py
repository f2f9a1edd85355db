"""The outputs of frozen encoders for photos, computed once: a training reads each photo hundreds of times."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.cache import Rows, cached_rows
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError

FORMAT = 2  # raise it when open_photo or to_pixels change
_AHEAD = 64  # photos that are decoded ahead; at 1,024 pixels a side they take 800 MB


def encoder_key(fingerprint: str, encoder: nn.Module) -> str:
    """Returns the part of a cache folder's name that stands for the base and its VAE.

    Args:
        fingerprint: the base's fingerprint, which only covers the parts that adapters change.
        encoder: the VAE, of which weights and config are hashed.
    """
    config: dict[str, Any] = dict(getattr(encoder, "config", {}))
    settings = {name: value for name, value in config.items() if not name.startswith("_")}  # no paths
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
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
    """Returns the latents `(m, c, h, w)` of photos, see `cached_photos`.

    Args:
        photos: the `m` photos.
        size: the side at which they are encoded, in pixels.
        encode: pixels `(b, 3, size, size)` in [-1, 1] → latents `(b, c, h, w)`.
        cache: the cache folder; it may serve many bases and sizes.
        key: the result of `encoder_key`.
        batch: the number of photos encoded at a time.
    """
    return cached_photos(photos, size, lambda pixels: {"latents": encode(pixels)}, cache, key, batch)[
        "latents"
    ]


def cached_photos(
    photos: Sequence[Photo],
    size: int,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    cache: Path,
    key: str,
    batch: int = 32,
) -> Rows:
    """Returns what frozen encoders make of photos, read from the cache or encoded and added to it.

    Each missing photo is decoded once, whatever number of tensors `encode` makes of it.

    Args:
        photos: the `m` photos.
        size: the side at which they are encoded, in pixels.
        encode: pixels `(b, 3, size, size)` in [-1, 1] → named tensors with `b` rows each.
        cache: the cache folder, created when missing; it may serve many encoders and sizes.
        key: a name for everything that `encode` depends on. Key, size and content decide on a row.
        batch: the number of photos encoded at a time.

    Returns:
        Tensors on the CPU with `m` rows each.

    Raises:
        InputError: there is no photo, a photo is broken, or an encoder returns NaN for one.
    """
    if not photos:
        raise InputError("no photo to encode; expected at least one")

    @torch.no_grad()
    def encode_all(batches: Sequence[list[int]]) -> Iterator[Mapping[str, Tensor]]:
        chosen = [photos[place] for places in batches for place in places]
        pixels = _decoded(chosen, size)
        for places in batches:
            rows = encode(torch.stack(list(islice(pixels, len(places)))))
            for name, tensor in rows.items():
                _check_finite([photos[place] for place in places], name, tensor)
            yield rows

    names = [photo.hash() for photo in photos]
    return cached_rows(names, encode_all, cache / f"{key}-{size}-{FORMAT}", batch, "encode photos")


def _decoded(photos: Sequence[Photo], size: int) -> Iterator[Tensor]:
    """Yields the pixels `(3, size, size)` of photos in order, decoded a little ahead by threads.

    Threads suffice: Pillow releases the interpreter's lock while it decodes and resizes, so they use all
    cores and run beside the encoders.
    """
    threads = ThreadPoolExecutor()
    waiting: deque[Future[Tensor]] = deque()
    left = iter(photos)
    try:
        while True:
            for photo in islice(left, _AHEAD - len(waiting)):
                waiting.append(threads.submit(lambda photo: to_pixels(photo.open(), size), photo))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _check_finite(photos: Sequence[Photo], name: str, rows: Tensor) -> None:
    """Raises an InputError that names the first photo whose row is not finite."""
    for photo, row in zip(photos, rows, strict=True):
        if not row.isfinite().all():
            raise InputError(f"{photo.path}: the base's encoder gives NaN ({name}); load the base in float32")
