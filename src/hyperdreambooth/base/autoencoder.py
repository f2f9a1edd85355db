"""Pixels ↔ latents, with the VAE of each family."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from hyperdreambooth.precision import without_autocast


@contextmanager
def _precise(vae: Any) -> Generator[torch.device]:
    """Runs the VAE in float32: some VAEs overflow in half precision, and photos are few."""
    dtype = vae.dtype
    nn.Module.to(vae, torch.float32)  # diffusers' own `to` warns about submodules that the VAE does not have
    try:
        with without_autocast(vae.device):
            yield vae.device
    finally:
        nn.Module.to(vae, dtype)  # exact, as float32 holds every half-precision number


def _statistics(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """Returns the mean and the scale of raw latents, of each channel `(c, 1, 1)` or of all.

    A scaled latent is `(raw - mean) * scale`. Dividing by a standard deviation would round SD's latents in
    another way than diffusers does, and than the caches hold them.
    """
    if hasattr(vae, "bn"):
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    elif _of_films(vae):
        mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    else:
        return vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return mean.view(-1, 1, 1).to(vae.device), 1 / std.view(-1, 1, 1).to(vae.device)


def _of_films(vae: Any) -> bool:
    """Returns whether an autoencoder takes films `(b, c, frames, h, w)`; a picture is one of one frame."""
    return "temperal_downsample" in vae.config


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Returns the scaled latents `(b, c, h/8, w/8)` of pixels `(b, 3, h, w)` in [-1, 1].

    They are the mode of the VAE's distribution and not a sample, so that they can be cached. An autoencoder
    with statistics of patches (FLUX.2) gives patches of 2 x 2 latents, `(b, 4c, h/16, w/16)`.
    """
    with _precise(vae) as device:
        pixels = pixels.to(device, torch.float32)
        raw = vae.encode(pixels.unsqueeze(2) if _of_films(vae) else pixels).latent_dist.mode()
        raw = raw.squeeze(2) if _of_films(vae) else raw
        mean, scale = _statistics(vae)
        return ((pixel_unshuffle(raw, 2) if hasattr(vae, "bn") else raw) - mean) * scale


def raw_latents(vae: Any, latents: Tensor) -> Tensor:
    """Returns what the VAE decodes, of scaled latents `(b, c, h, w)`."""
    mean, scale = _statistics(vae)
    raw = latents / scale + mean
    if hasattr(vae, "bn"):
        return pixel_shuffle(raw, 2)
    return raw.unsqueeze(2) if _of_films(vae) else raw


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Returns the pixels `(b, 3, h, w)` in [-1, 1] of scaled latents."""
    with _precise(vae) as device:
        pixels = vae.decode(raw_latents(vae, latents.to(device, torch.float32))).sample
    return (pixels.squeeze(2) if _of_films(vae) else pixels).clamp(-1, 1)
