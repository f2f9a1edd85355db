"""The denoising loss, the same for every family of bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.base.config import LossConfig, Weighting
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.load import Base
from hyperdreambooth.runs import rng

Key: TypeAlias = tuple[int | str, ...]
"""The name of a random draw: whoever asks for the same key gets the same noise and timestep."""


def _levels(base: Base, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the signal and noise levels of timesteps, `(b, 1, 1, 1)` each."""
    signal, sigma = base.family.NOISING.levels(base.pipe.scheduler, timesteps)
    return signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


# x_t = signal · x_0 + σ ε
def add_noise(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns the noisy latents `(b, c, h, w)` at timesteps `(b,)`."""
    signal, sigma = _levels(base, timesteps)
    return signal * latents + sigma * noise


def target(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns what the denoiser should predict, `(b, c, h, w)`."""
    levels = _levels(base, timesteps)
    return base.family.NOISING.target(base.pipe.scheduler, latents, noise, *levels)


# E‖ε - ε_θ(x_t, c, t)‖²   (paper, equation 1), one value a sample
def denoise_loss(
    base: Base,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    timesteps: Tensor,
    mask: Tensor | None = None,
    weighting: Weighting = "uniform",
) -> Tensor:
    """Returns the mean squared error of the denoiser's prediction for each sample, `(b,)`.

    Clean latents and noise are `(b, c, h, w)`, timesteps `(b,)`. The mask `(b, 1, h, w)` weights pixels, for
    example those of the face, and `weighting` noise levels, see `loss_weights`.
    """
    noisy = add_noise(base, latents, noise, timesteps).to(base.dtype)
    prediction = base.predict(noisy, timesteps, conditioning).float()
    error = (prediction - target(base, latents, noise, timesteps)).square()
    weights = loss_weights(base, timesteps, weighting)
    if mask is None:
        return weights * error.mean(dim=(1, 2, 3))
    covered = (mask.sum(dim=(1, 2, 3)) * error.shape[1]).clamp_min(1e-6)
    return weights * (error * mask).sum(dim=(1, 2, 3)) / covered


# min(SNR, 5)  (Hang et al., arXiv 2303.09556) or √SNR  (Yu et al., arXiv 2310.08442), times the error of x_0
def loss_weights(base: Base, timesteps: Tensor, weighting: Weighting) -> Tensor:
    """Returns the weight of each sample's squared error, `(b,)`, whatever the denoiser predicts (ε or v).

    The errors of nearly clean latents are the largest and say the least about a person. `min_snr` gives them
    less weight. `debiased` also gives more weight to the noisiest latents, where skin, hair and the shape of
    the face are decided. Of the three, `debiased` learns a person in the fewest steps (docs/LOG.md).
    """
    if weighting == "uniform":
        return torch.ones(len(timesteps), device=timesteps.device)
    signal, sigma = base.family.NOISING.levels(base.pipe.scheduler, timesteps)
    snr = (signal / sigma).square()
    weights = snr.clamp(max=5) if weighting == "min_snr" else torch.minimum(snr.sqrt(), 10 * snr)
    return weights * base.family.NOISING.to_clean(base.pipe.scheduler, signal, sigma)


def sample_noise(base: Base, shape: tuple[int, ...], *key: int | str, bias: int = 1) -> tuple[Tensor, Tensor]:
    """Samples the noise `(c, h, w)` and the timestep `()` of one key, see `sample_noises`."""
    noise, timesteps = sample_noises(base, shape, [key], bias)
    return noise[0], timesteps[0]


def sample_noises(
    base: Base, shape: tuple[int, ...], keys: Sequence[Key], bias: int = 1
) -> tuple[Tensor, Tensor]:
    """Samples the noise `(b, c, h, w)` and the timesteps `(b,)`, each sample as a pure function of its key.

    Of `bias` timesteps the noisiest is kept. A nearly clean picture already shows who it is, so a step spent
    on it teaches next to nothing about a person (docs/LOG.md).
    """
    patches = shape[-1] * shape[-2] // base.family.PATCH**2
    scheduler, noising = base.pipe.scheduler, base.family.NOISING
    noise: list[Tensor] = []
    timesteps: list[Tensor] = []
    for key in keys:
        generator = rng(*key)
        timesteps.append(max(noising.sample_timestep(scheduler, generator, patches) for _ in range(bias)))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise).to(base.device), torch.stack(timesteps).to(base.device)


def sampled_loss(
    base: Base,
    latents: Tensor,
    keys: Sequence[Key],
    conditioning: Conditioning,
    config: LossConfig,
    mask: Tensor | None = None,
) -> Tensor:
    """Samples noise and timesteps by key and returns the `denoise_loss` of each sample.

    The caller opens the autocast, in which the captions must be encoded as well.
    """
    noise, timesteps = sample_noises(base, tuple(latents.shape[1:]), keys, config.timestep_bias)
    return denoise_loss(base, latents, conditioning, noise, timesteps, mask, config.weighting)
