"""A VAE with new or rescaled channels draws as before: nothing that was learned is lost."""

from __future__ import annotations

import numpy as np
import torch

from hyperdreambooth.avatars.build.autoencoder import (
    COARSE_CHANNELS,
    LATENT_CHANNELS,
    even_precision,
    new_vae,
    widen,
)
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.draw.people import context

CONTEXTS = [context(seed) for seed in range(8)]


@torch.no_grad()
def test_a_wide_vae_answers_as_before() -> None:
    coarse = new_vae(0).eval()
    wide = widen(coarse, 1).eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    old, new = coarse.encode(pixels).latent_dist, wide.encode(pixels).latent_dist
    assert new.mean.shape[1] == LATENT_CHANNELS
    torch.testing.assert_close(new.mean[:, :COARSE_CHANNELS], old.mean)
    torch.testing.assert_close(new.logvar[:, :COARSE_CHANNELS], old.logvar)
    torch.testing.assert_close(wide.decode(new.mean).sample, coarse.decode(old.mean).sample)


@torch.no_grad()
def test_channels_of_one_precision_draw_the_same_pictures() -> None:
    vae = new_vae(0, 6).eval()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(torch.linspace(1, 9, 12).view(-1, 1, 1, 1))
    drawn = Pictures(
        [np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)], [], CONTEXTS, 1
    )
    pixels = drawn.batch(torch.arange(8))
    before = vae.encode(pixels).latent_dist
    shown = vae.decode(before.mean).sample
    even_precision(vae, drawn, "cpu")
    after = vae.encode(pixels).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, shown, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    precision = after.var.mean(dim=(0, 2, 3))
    torch.testing.assert_close(precision, precision.mean().expand(6), atol=0, rtol=1e-3)
    ratio = after.std / before.std
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), atol=0, rtol=1e-3)
