"""The settings of `hdb train`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hyperdreambooth.base.denoise import Weighting
from hyperdreambooth.hypernet.loss import Schedule
from hyperdreambooth.precision import Precision

_TELLING = (
    "log_every",
    "validate_every",
    "draws",
    "prompts",
    "save_every",
    "max_minutes",
    "finetune",
    "stored",
    "strength",
)


class HypernetConfig(BaseModel):
    """What decides a hypernetwork. A schedule is a number or `[[step, value], …]`, straight lines between.

    Attributes:
        encoder: transformers vision model, folder or hub id; frozen.
        encoder_layers: its hidden states to read; empty for the last.
        refinements: `K`; worth little, costs little (training.md 6).
        rank, down_dim, up_dim, basis_seed, text_encoder: the numbers to predict; a bank brings its own.
        learn_basis: train the aux bases as well (the "pro" variant); a bank then only gives start and scale.
        basis_lr: their learning rate.
        spread: the scale of the numbers where no bank tells it.
        batch: identities an update, over all processes and accumulated parts.
        photos: target photos an identity.
        alpha, beta, gamma: weights of the denoising, weight and size losses.
        weighting: how much the denoising loss counts at each noise level, see `base.denoise.loss_weights`.
        timestep_bias: a step takes the noisiest of so many timesteps, see `denoise.sample_noise`; 1 for none.
        weight_loss: on ΔW (training.md 2), or on balanced numbers.
        optimizer: `adamw8bit` keeps its state in bytes; needs bitsandbytes.
        bank_share: share of a batch that is drawn from identities the bank covers, where it does not cover
            all.
        prompt: caption of photos without one of their own.
        ema: decay of the averaged weights, which are what is exported.
        precision: of the forward and backward; `auto` is what is fast here.
        checkpointing: gradient checkpointing in the base's denoiser: less memory, a third slower.
        validation: identities held out (at most a quarter of them).
        draws: noise draws a held-out identity at each validation.
        prompts: what validation pictures show, taken in turn.
        max_minutes: stop cleanly after this long; the same command goes on.
        start_from: a hypernetwork folder of the same shape whose weights to begin with.
        finetune: settings that suit the finetune of its predictions (`lr`, `steps`, `rank`, …); they travel
            in its folder and are the finetune's defaults.
        strength: what the trained network predicts, times this. One photo leaves much open, and the loss is
            least at a cautious answer, near the mean of all who look so; above 1 is bolder. Choose it on
            people that nobody trained on (docs/LOG.md).
        stored: number format of the exported weights; float16 halves the folder and moves predictions by less
            than a hundredth.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = "facebook/dinov2-small"
    encoder_layers: tuple[int, ...] = ()
    width: int = Field(256, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    refinements: int = Field(2, ge=1)
    rank: int = Field(1, ge=1)
    down_dim: int = Field(100, ge=1)
    up_dim: int = Field(50, ge=1)
    basis_seed: int = 0
    text_encoder: bool = True
    learn_basis: bool = False
    basis_lr: float = Field(1e-4, ge=0)
    spread: float = Field(0.1, gt=0)
    steps: int = Field(10_000, ge=1)
    batch: int = Field(32, ge=1)
    photos: int = Field(1, ge=1)
    lr: float = Field(5e-4, gt=0)
    warmup: int = Field(100, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    alpha: Schedule = 1.0
    beta: Schedule = 0.1
    gamma: Schedule = 1e-3
    weighting: Weighting = "uniform"
    timestep_bias: int = Field(1, ge=1)
    weight_loss: Literal["delta", "numbers"] = "delta"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    bank_share: float = Field(0.25, ge=0, le=1)
    prompt: str = "a photo of a [V] {class_word}"
    ema: float = Field(0.999, ge=0, lt=1)
    precision: Precision = "float32"
    accumulation: int = Field(1, ge=1)
    checkpointing: bool = False
    validation: int = Field(16, ge=0)
    validate_every: int = Field(500, ge=1)
    draws: int = Field(4, ge=1)
    prompts: tuple[str, ...] = ("a photo of a [V] {class_word}",)
    save_every: int = Field(500, ge=1)
    log_every: int = Field(10, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    seed: int = 0
    start_from: str | None = None
    finetune: dict[str, Any] = {}
    stored: Literal["float32", "float16"] = "float32"
    strength: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """What single fields cannot say."""
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if not self.prompts:
            raise ValueError("prompts: give at least one")
        for name in ("alpha", "beta", "gamma"):
            points = getattr(self, name)
            if isinstance(points, list) and [step for step, _ in points] != sorted(
                {step for step, _ in points}
            ):
                raise ValueError(f"{name}: [[step, value], …] with growing steps expected, got {points}")
            values = [value for _, value in points] if isinstance(points, list) else [points]
            if not values or min(values) < 0:
                raise ValueError(f"{name}: at least one value, none below 0, expected, got {points}")
        return self

    def deciding(self) -> HypernetConfig:
        """The same config without what only tells or stops: a resumed run may change that."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in _TELLING})
