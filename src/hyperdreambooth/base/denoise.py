"""The denoising loss, the same for every family: noise or velocity over a table, or a flow's velocity."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.load import Base
from hyperdreambooth.runs import rng

Weighting: TypeAlias = Literal["uniform", "min_snr", "debiased"]


def _levels(base: Base, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise levels, `(b, 1, 1, 1)` each."""
    signal, sigma = base.family.NOISING.levels(base.pipe.scheduler, timesteps)
    return signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


# x_t = signal · x_0 + σ ε
def add_noise(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents `(b, c, h, w)` at timesteps `(b,)`."""
    signal, sigma = _levels(base, timesteps)
    return signal * latents + sigma * noise


def target(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser should answer, `(b, c, h, w)`."""
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
    """Mean squared error of the denoiser's answer, a value a sample.

    Args:
        base: the frozen base, wearing what is trained.
        latents: clean latents `(b, c, h, w)`.
        conditioning: of the `b` prompts.
        noise: `(b, c, h, w)`.
        timesteps: `(b,)`, as `sample_noise` gives them.
        mask: weights `(b, 1, h, w)`, for example of the face; None for all ones.
        weighting: of noise levels, see `loss_weights`.

    Returns:
        `(b,)` float32, outside autocast.
    """
    noisy = add_noise(base, latents, noise, timesteps).to(base.dtype)
    answer = base.predict(noisy, timesteps, conditioning).float()
    error = (answer - target(base, latents, noise, timesteps)).square()
    weights = loss_weights(base, timesteps, weighting)
    if mask is None:
        return weights * error.mean(dim=(1, 2, 3))
    covered = (mask.sum(dim=(1, 2, 3)) * error.shape[1]).clamp_min(1e-6)
    return weights * (error * mask).sum(dim=(1, 2, 3)) / covered


# min(SNR, 5)  (Hang et al., arXiv 2303.09556) or √SNR  (Yu et al., arXiv 2310.08442), times the error of x_0
def loss_weights(base: Base, timesteps: Tensor, weighting: Weighting) -> Tensor:
    """Weights `(b,)` of the squared error of the answer at timesteps `(b,)`, whatever the denoiser is asked.

    Errors of nearly clean latents are the largest and say the least about a person. `min_snr` makes them
    count less; `debiased` also makes the noisiest count more, where skin, hair and the shape of the face are
    decided: of the three it learns a person in the fewest steps (docs/LOG.md).
    """
    if weighting == "uniform":
        return torch.ones(len(timesteps), device=timesteps.device)
    signal, sigma = base.family.NOISING.levels(base.pipe.scheduler, timesteps)
    snr = (signal / sigma).square()
    weights = snr.clamp(max=5) if weighting == "min_snr" else torch.minimum(snr.sqrt(), 10 * snr)
    return weights * base.family.NOISING.to_clean(base.pipe.scheduler, signal, sigma)


def sample_noise(
    base: Base, shape: tuple[int, ...], *key: int | str, offset: float = 0.0, bias: int = 1
) -> tuple[Tensor, Tensor]:
    """Noise of `shape` and one timestep `()`, a pure function of the key (so training resumes exactly).

    Args:
        base: whose scheduler the timestep is drawn for.
        shape: `(c, h, w)` of one sample's latents.
        key: names the draw.
        offset: of the noise's mean a channel, so that dark and bright photos are learned; 0 for none.
        bias: of so many timesteps the noisiest is taken. A nearly clean picture shows who it is by itself, so
            a step spent there teaches next to nothing about a person (docs/LOG.md).
    """
    generator = rng(*key)
    patches = shape[-1] * shape[-2] // 4  # what a transformer with patches of 2 x 2 sees
    scheduler, noising = base.pipe.scheduler, base.family.NOISING
    timestep = max(noising.sample_timestep(scheduler, generator, patches) for _ in range(bias))
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(shape[0], 1, 1, generator=generator)
    return noise.to(base.device), timestep.to(base.device)
