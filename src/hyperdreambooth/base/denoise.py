"""The denoising loss, the same for every family of bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.base.config import LossConfig, Weighting
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.load import Base
from hyperdreambooth.captured import sent
from hyperdreambooth.runs import rng

Key: TypeAlias = tuple[int | str, ...]
"""The name of a random draw: whoever asks for the same key gets the same noise and timestep."""


class Draw(NamedTuple):
    """The random part of a step's samples, and what follows from it alone; all lead with the batch axis.

    Attributes:
        noise: `(b, c, h, w)`.
        timesteps: `(b,)`.
        signal, sigma: the levels of the latents and of the noise, `(b, 1, 1, 1)`.
        weights: of the squared errors, `(b,)`, see `loss_weights`.
    """

    noise: Tensor
    timesteps: Tensor
    signal: Tensor
    sigma: Tensor
    weights: Tensor


def draw_of(base: Base, noise: Tensor, timesteps: Tensor, weighting: Weighting = "uniform") -> Draw:
    """Returns noise `(b, c, h, w)` and timesteps `(b,)` with what follows from them."""
    levels = base.family.NOISING.levels(base.pipe.scheduler, timesteps)
    signal, sigma = (level.view(-1, 1, 1, 1) for level in levels)
    return Draw(noise, timesteps, signal, sigma, loss_weights(base, timesteps, weighting))


# x_t = signal · x_0 + σ ε
def add_noise(latents: Tensor, draw: Draw) -> Tensor:
    """Returns the noisy latents, `(b, c, h, w)` like the clean ones."""
    return draw.signal * latents + draw.sigma * draw.noise


# ‖ε_θ(x_t, c) - ε_bare(x_t, c)‖² where c names the class: distillation (Li and Hoiem, arXiv 1606.09282)
def target(base: Base, latents: Tensor, draw: Draw, answers: Tensor | None = None) -> Tensor:
    """Returns what the denoiser should predict, `(b, c, h, w)`.

    Args:
        base: has the kind of noising.
        latents: `(b, c, h, w)`, clean.
        draw: noise and levels of the samples.
        answers: of the bare base, wanted of the last samples in place of the noise; None for none. These
            samples have captions of the class, which thus stays what it was.
    """
    scheduler = base.pipe.scheduler
    wanted = base.family.NOISING.target(scheduler, latents, draw.noise, draw.signal, draw.sigma)
    return wanted if answers is None else torch.cat([wanted[: -len(answers)], answers])


def denoise_loss(
    base: Base,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    timesteps: Tensor,
    mask: Tensor | None = None,
    weighting: Weighting = "uniform",
) -> Tensor:
    """Returns the `draw_loss` of clean latents and noise `(b, c, h, w)` at timesteps `(b,)`."""
    return draw_loss(base, latents, conditioning, draw_of(base, noise, timesteps, weighting), mask)


# E‖ε - ε_θ(x_t, c, t)‖²   (paper, equation 1), one value a sample
def draw_loss(
    base: Base,
    latents: Tensor,
    conditioning: Conditioning,
    draw: Draw,
    mask: Tensor | None = None,
    answers: Tensor | None = None,
) -> Tensor:
    """Returns the mean squared error of the denoiser's prediction for each sample, `(b,)`.

    It reads nothing but its arguments and the base's weights, so that a CUDA graph can replay it.

    Args:
        base: predicts the noise or the velocity.
        latents: `(b, c, h, w)`, clean.
        conditioning: the encoded captions.
        draw: noise and timesteps of the samples.
        mask: the weights of the pixels `(b, 1, h, w)`, for example those of the face; None for all alike.
        answers: what should be predicted of the last samples, see `target`; None for the usual.
    """
    prediction = answer(base, latents, conditioning, draw)
    error = (prediction - target(base, latents, draw, answers)).square()
    if mask is None:
        return draw.weights * error.mean(dim=(1, 2, 3))
    covered = (mask.sum(dim=(1, 2, 3)) * error.shape[1]).clamp_min(1e-6)
    return draw.weights * (error * mask).sum(dim=(1, 2, 3)) / covered


def answer(base: Base, latents: Tensor, conditioning: Conditioning, draw: Draw) -> Tensor:
    """Returns what the denoiser, as it is worn now, predicts for noisy latents, `(b, c, h, w)` float32."""
    noisy = add_noise(latents, draw).to(base.dtype)
    return base.predict(noisy, draw.timesteps, conditioning).float()


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
    noise, timesteps = _sampled(base, shape, keys, bias)
    return noise.to(base.device), timesteps.to(base.device)


def _sampled(base: Base, shape: tuple[int, ...], keys: Sequence[Key], bias: int) -> tuple[Tensor, Tensor]:
    """Returns the noise and the timesteps of `sample_noises` on the CPU, where they are drawn."""
    patches = shape[-1] * shape[-2] // base.family.PATCH**2
    scheduler, noising = base.pipe.scheduler, base.family.NOISING
    noise: list[Tensor] = []
    timesteps: list[Tensor] = []
    for key in keys:
        generator = rng(*key)
        timesteps.append(max(noising.sample_timestep(scheduler, generator, patches) for _ in range(bias)))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(timesteps)


def sample_draw(base: Base, shape: tuple[int, ...], keys: Sequence[Key], config: LossConfig) -> Draw:
    """Samples a step's draw by key, on the base's device; the host does not wait for the device."""
    noise, timesteps = _sampled(base, shape, keys, config.timestep_bias)
    draw = draw_of(base, noise, timesteps, config.weighting)
    return Draw(*(sent(tensor, base.device) for tensor in draw))


def sampled_loss(
    base: Base,
    latents: Tensor,
    keys: Sequence[Key],
    conditioning: Conditioning,
    config: LossConfig,
    mask: Tensor | None = None,
    answers: Tensor | None = None,
) -> Tensor:
    """Samples noise and timesteps by key and returns the `draw_loss` of each sample.

    The caller opens the autocast, in which the captions must be encoded as well. `answers` are wanted of the
    last samples, see `target`.
    """
    draw = sample_draw(base, tuple(latents.shape[1:]), keys, config)
    return draw_loss(base, latents, conditioning, draw, mask, answers)


@torch.no_grad()
def sampled_answer(
    base: Base, latents: Tensor, keys: Sequence[Key], conditioning: Conditioning, config: LossConfig
) -> Tensor:
    """Samples noise and timesteps by key and returns the `answer` to each sample."""
    return answer(base, latents, conditioning, sample_draw(base, tuple(latents.shape[1:]), keys, config))
