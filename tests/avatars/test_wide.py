"""A VAE and a base with new channels answer as before: nothing that was learned is lost by widening."""

from __future__ import annotations

import torch

from hyperdreambooth.avatars.build.autoencoder import COARSE_CHANNELS, LATENT_CHANNELS, new_vae, widen
from hyperdreambooth.avatars.build.diffusion import assemble, widen_base


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
def test_a_wide_base_answers_as_before() -> None:
    coarse = new_vae(0)
    pipe = assemble(coarse, 0)
    before = pipe.unet
    noisy = torch.randn(2, LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    told, times = torch.randn(2, 5, 128), torch.tensor([10, 900])
    wide = widen_base(pipe, widen(coarse, 1))
    answer = wide.unet(noisy, times, told).sample
    torch.testing.assert_close(
        answer[:, :COARSE_CHANNELS], before(noisy[:, :COARSE_CHANNELS], times, told).sample
    )
    assert not answer[:, COARSE_CHANNELS:].any()
    assert wide.vae.config.latent_channels == wide.unet.config.in_channels == LATENT_CHANNELS
