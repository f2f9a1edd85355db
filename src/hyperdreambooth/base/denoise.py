"""Noising and the denoising loss, the same for every family that predicts noise or velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.base.sd import Conditioning
from hyperdreambooth.runs import draw


def _signal_and_noise(base: Base, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    alphas = base.family.alphas_cumprod(base.pipe, timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


# x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε   (DDPM, equation 4)
def add_noise(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents `(b, c, h, w)` at timesteps `(b,)`."""
    signal, sigma = _signal_and_noise(base, timesteps)
    return signal * latents + sigma * noise


# ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x_0   (progressive distillation, appendix D)
def target(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser should answer, `(b, c, h, w)`."""
    if base.pipe.scheduler.config.prediction_type == "v_prediction":
        signal, sigma = _signal_and_noise(base, timesteps)
        return signal * noise - sigma * latents
    return noise


# E‖ε - ε_θ(x_t, c, t)‖²   (paper, equation 1), one value a sample
def denoise_loss(
    base: Base,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    timesteps: Tensor,
    mask: Tensor | None = None,
    snr_gamma: float = 0.0,
) -> Tensor:
    """Mean squared error of the denoiser's answer, a value a sample.

    Args:
        base: the frozen base, wearing what is trained.
        latents: clean latents `(b, c, h, w)`.
        conditioning: of the `b` prompts.
        noise: `(b, c, h, w)`.
        timesteps: `(b,)` int64.
        mask: weights `(b, 1, h, w)`, for example of the face; None for all ones.
        snr_gamma: γ of min-SNR weighting; 0 for none.

    Returns:
        `(b,)` float32, outside autocast.
    """
    noisy = add_noise(base, latents, noise, timesteps).to(base.dtype)
    answer = base.predict(noisy, timesteps, conditioning).float()
    error = (answer - target(base, latents, noise, timesteps)).square()
    weights = snr_weights(base, timesteps, snr_gamma)
    if mask is None:
        return weights * error.mean(dim=(1, 2, 3))
    covered = (mask.sum(dim=(1, 2, 3)) * error.shape[1]).clamp_min(1e-6)
    return weights * (error * mask).sum(dim=(1, 2, 3)) / covered


# min(SNR, γ) / SNR for noise, / (SNR + 1) for velocity   (Hang et al., arXiv 2303.09556)
def snr_weights(base: Base, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights `(b,)` of the loss at timesteps `(b,)`: nearly clean latents, which say little, count less."""
    if gamma == 0:
        return torch.ones(len(timesteps), device=timesteps.device)
    signal, sigma = (each.flatten() for each in _signal_and_noise(base, timesteps))
    snr = (signal / sigma).square()
    velocity = base.pipe.scheduler.config.prediction_type == "v_prediction"
    return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)


def draw_noise(base: Base, shape: tuple[int, ...], *key: int | str) -> tuple[Tensor, Tensor]:
    """Noise of `shape` and one timestep `()`, a pure function of the key (so training resumes exactly)."""
    generator = draw(*key)
    steps = base.pipe.scheduler.config.num_train_timesteps
    timestep = torch.randint(0, steps, (), generator=generator)
    return torch.randn(shape, generator=generator).to(base.device), timestep.to(base.device)
