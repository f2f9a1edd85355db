"""Pixels ↔ latents, by the VAE that every family here has."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def _precise(vae: Any) -> Generator[torch.device]:
    """The VAE in float32 for the length of the block: some overflow in half precision, and photos are few."""
    dtype = vae.dtype
    nn.Module.to(vae, torch.float32)  # its own `to` warns of what it does not even have
    try:
        with torch.autocast(vae.device.type, enabled=False):
            yield vae.device
    finally:
        nn.Module.to(vae, dtype)  # the very numbers that it had: float32 holds every half


@torch.no_grad()
def encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels `(b, 3, h, w)` in [-1, 1] → scaled latents `(b, c, h/8, w/8)`: the mode, so it can be cached."""
    with _precise(vae) as device:
        mode = vae.encode(pixels.to(device, torch.float32)).latent_dist.mode()
    return (mode - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents → pixels `(b, 3, h, w)` in [-1, 1]."""
    with _precise(vae) as device:
        raw = latents.to(device, torch.float32) / vae.config.scaling_factor
        return vae.decode(raw + (vae.config.shift_factor or 0.0)).sample.clamp(-1, 1)
