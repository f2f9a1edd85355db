"""Pixels ↔ latents, with the VAE that every family here has."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def _precise(vae: Any) -> Generator[torch.device]:
    """Runs the VAE in float32: some VAEs overflow in half precision, and photos are few."""
    dtype = vae.dtype
    nn.Module.to(vae, torch.float32)  # diffusers' own `to` warns about submodules that the VAE does not have
    try:
        with torch.autocast(vae.device.type, enabled=False):
            yield vae.device
    finally:
        nn.Module.to(vae, dtype)  # exact, as float32 holds every half-precision number


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Returns the scaled latents `(b, c, h/8, w/8)` of pixels `(b, 3, h, w)` in [-1, 1].

    They are the mode of the VAE's distribution and not a sample, so that they can be cached.
    """
    with _precise(vae) as device:
        mode = vae.encode(pixels.to(device, torch.float32)).latent_dist.mode()
    return (mode - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Returns the pixels `(b, 3, h, w)` in [-1, 1] of scaled latents."""
    with _precise(vae) as device:
        raw = latents.to(device, torch.float32) / vae.config.scaling_factor
        return vae.decode(raw + (vae.config.shift_factor or 0.0)).sample.clamp(-1, 1)
