"""Noise levels and prediction targets: ε or v of a diffusion model, or the velocity of a flow model.

Both kinds have a signal level and a noise level at every timestep, `x_t = signal · x_0 + σ · ε`. The levels
come from the scheduler's config and training tables, which sampling never changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.files import InputError


class Diffusion:
    """A diffusion model with a table of ᾱ_t, which predicts noise (DDPM) or v (progressive distillation)."""

    def check(self, scheduler: Any) -> None:
        """Raises an InputError for a scheduler without such a table, or with another prediction type."""
        predicts = getattr(scheduler.config, "prediction_type", None)
        if not hasattr(scheduler, "alphas_cumprod") or predicts not in ("epsilon", "v_prediction"):
            raise InputError(
                f"scheduler {type(scheduler).__name__}: expected alphas_cumprod and prediction_type "
                f"epsilon or v_prediction, got {predicts}; save the pipeline with its DDIM scheduler"
            )

    def check_steps(self, scheduler: Any, field: str, steps: int) -> None:
        """Raises an InputError, which names the field, for a number of steps that a scheduler cannot make."""
        try:
            type(scheduler).from_config(scheduler.config).set_timesteps(steps)
        except ValueError as error:
            raise InputError(
                f"{field}: the base's {type(scheduler).__name__} cannot make {steps} steps ({error}); "
                "ask for another number, such as 25"
            ) from None

    def sample_timestep(self, scheduler: Any, generator: torch.Generator, tokens: int) -> Tensor:
        """Samples one timestep `()` int64 uniformly."""
        return torch.randint(0, scheduler.config.num_train_timesteps, (), generator=generator)

    def levels(self, scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns √ᾱ_t and √(1-ᾱ_t), `(b,)` each   (DDPM, equation 4)."""
        alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def at(self, scheduler: Any, part: Tensor) -> Tensor:
        """Returns the timesteps `(b,)` int64 at parts of the way from a picture, 0, to noise, 1."""
        last = scheduler.config.num_train_timesteps
        return (part * last).long().clamp(max=last - 1)

    # the inverse of `target`
    def seen(
        self, scheduler: Any, noisy: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the latents and the noise that a prediction sees in noisy latents, `(b, c, h, w)` each."""
        if scheduler.config.prediction_type == "v_prediction":
            return signal * noisy - sigma * prediction, sigma * noisy + signal * prediction
        return (noisy - sigma * prediction) / signal, prediction

    def target(self, scheduler: Any, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Returns ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x_0   (progressive distillation, appendix D)."""
        if scheduler.config.prediction_type == "v_prediction":
            return signal * noise - sigma * latents
        return noise

    def to_clean(self, scheduler: Any, signal: Tensor, sigma: Tensor) -> Tensor:
        """Returns the factor from the squared error of the prediction to that of x_0: σ² / signal² or σ²."""
        return sigma**2 if scheduler.config.prediction_type == "v_prediction" else (sigma / signal) ** 2


@dataclass(frozen=True)
class Flow:
    """A flow model, which predicts the velocity of a straight line from latents to noise (arXiv 2403.03206).

    Timesteps are real numbers, `t = σ · num_train_timesteps`, as the denoisers expect them. σ is sampled from
    a logit-normal distribution, as the paper recommends, or uniformly.
    """

    logit_normal: bool

    def check(self, scheduler: Any) -> None:
        """Raises an InputError for a scheduler of another kind."""
        if "shift" not in scheduler.config:
            raise InputError(
                f"scheduler {type(scheduler).__name__}: expected a flow-matching one with a shift; save "
                "the pipeline with its FlowMatchEulerDiscreteScheduler"
            )

    def check_steps(self, scheduler: Any, field: str, steps: int) -> None:
        """Refuses nothing: a flow can be followed in any number of steps."""

    # σ' = s σ / (1 + (s - 1) σ)   (arXiv 2403.03206, equation 23)
    def sample_timestep(self, scheduler: Any, generator: torch.Generator, tokens: int) -> Tensor:
        """Samples one timestep `()` float32, shifted towards noise as the scheduler does for these tokens."""
        # float64, as the bits of float32 draws depend on the CPU's instruction set
        if self.logit_normal:
            u = torch.randn((), generator=generator, dtype=torch.float64).sigmoid()
        else:
            u = 1 - torch.rand((), generator=generator, dtype=torch.float64)
        s = _shift(scheduler.config, tokens)
        return (s * u / (1 + (s - 1) * u) * scheduler.config.num_train_timesteps).float()

    def levels(self, scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 1 - σ and σ, `(b,)` each."""
        sigma = timesteps / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def at(self, scheduler: Any, part: Tensor) -> Tensor:
        """Returns the timesteps `(b,)` float32 at parts of the way from a picture, 0, to noise, 1."""
        return part * scheduler.config.num_train_timesteps

    # the inverse of `target`
    def seen(
        self, scheduler: Any, noisy: Tensor, prediction: Tensor, signal: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the latents and the noise that a prediction sees in noisy latents, `(b, c, h, w)` each."""
        return noisy - sigma * prediction, noisy + signal * prediction

    def target(self, scheduler: Any, latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """Returns ε - x_0   (arXiv 2403.03206, equation 13)."""
        return noise - latents

    def to_clean(self, scheduler: Any, signal: Tensor, sigma: Tensor) -> Tensor:
        """Returns σ²: x_0 = x_t - σ v, so an error of v changes x_0 by σ times as much."""
        return sigma**2


def _shift(config: Any, tokens: int) -> float:
    """Returns the scheduler's shift: fixed, or between `base_shift` and `max_shift` by the image size."""
    if not config.get("use_dynamic_shifting"):
        return float(config.shift)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
