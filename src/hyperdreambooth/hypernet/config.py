"""The settings of `hdb train`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hyperdreambooth.base.config import LossConfig

# the settings that do not change the weights
_TIMES = {"log_every", "validate_every", "save_every", "max_minutes"}
_SHOWN = {"draws", "prompts", "finetune", "stored", "strength"}


class HypernetConfig(LossConfig):
    """The settings of a hypernetwork's training, with those of `LossConfig`.

    Attributes:
        encoder: a transformers vision model, by folder or hub id, or `avatars` for the shipped one; it stays
            frozen. None stands for `avatars` on the avatars' base, and for `facebook/dinov2-small` elsewhere.
        encoder_layers: the hidden states of the encoder to read; empty for the last one.
        width, layers, heads: the channels, blocks and attention heads of the decoder.
        refinements: `K`, the passes of the decoder; more of them gain little (training.md 6).
        rank, down_dim, up_dim, basis_seed, text_encoder: the LiDB to predict. A bank brings its own.
        learn_basis: also train the aux bases (the "pro" variant). A bank then only gives start and scale.
        spread: the scale of the numbers where there is no bank.
        batch, photos: identities in an update, over all processes, and target photos for each of them.
        warmup: the steps of the learning rate's linear rise; after them it falls to 0 as half a cosine.
        weight_decay: of AdamW; learned bases do not decay.
        alpha, beta, gamma: the weights of the denoising loss, the weight loss and the size loss.
        optimizer: `adamw8bit` keeps its state in 8 bits and needs bitsandbytes.
        ema: the decay of the averaged weights, which are the ones that are exported.
        accumulation: the parts of a batch, whose gradients are accumulated.
        validation: identities held out, at most a quarter of them.
        validate_every, save_every, log_every: in steps.
        draws: noise samples for each held-out identity at a validation.
        prompts: of validation pictures, used in turn.
        max_minutes: stop cleanly after this time; the same command continues.
        start_from: a hypernetwork folder of the same shape whose weights to start from. Its base may be
            another one with the same layers, such as a fine-tuned version.
        finetune: settings of a finetune (`lr`, `steps`, `rank`, …) that become its defaults.
        stored: the format of exported weights; float16 changes predictions by less than a hundredth.
        strength: the factor of the predictions. One photo leaves much open, and the loss is lowest for a
            cautious prediction near the mean of all similar people. Above 1, predictions are bolder. Choose
            it on people that nobody trained on (docs/LOG.md).
    """

    lr: float = Field(default=5e-4, gt=0)
    encoder: str | None = None
    encoder_layers: tuple[int, ...] = ()
    width: int = Field(default=256, ge=1)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    refinements: int = Field(default=2, ge=1)
    rank: int = Field(default=1, ge=1)
    down_dim: int = Field(default=100, ge=1)
    up_dim: int = Field(default=50, ge=1)
    basis_seed: int = 0
    text_encoder: bool = True
    learn_basis: bool = False
    basis_lr: float = Field(default=1e-4, ge=0)
    spread: float = Field(default=0.1, gt=0)
    steps: int = Field(default=10_000, ge=1)
    batch: int = Field(default=32, ge=1)
    photos: int = Field(default=1, ge=1)
    warmup: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=0.1, ge=0)
    gamma: float = Field(default=1e-3, ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema: float = Field(default=0.999, ge=0, lt=1)
    accumulation: int = Field(default=1, ge=1)
    validation: int = Field(default=16, ge=0)
    validate_every: int = Field(default=500, ge=1)
    draws: int = Field(default=4, ge=1)
    prompts: tuple[str, ...] = ("a photo of a [V] {class_word}",)
    save_every: int = Field(default=500, ge=1)
    log_every: int = Field(default=10, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    start_from: str | None = None
    finetune: dict[str, Any] = Field(default_factory=dict[str, Any])
    stored: Literal["float32", "float16"] = "float32"
    strength: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Checks what the single fields cannot."""
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads {self.heads}, got {self.width}")
        if not self.prompts:
            raise ValueError("prompts: expected at least one, got none")
        return self

    def deciding(self) -> HypernetConfig:
        """Returns the config with defaults for all settings that a resumed run may change."""
        return type(self)(**self.model_dump(exclude=_TIMES | _SHOWN))
