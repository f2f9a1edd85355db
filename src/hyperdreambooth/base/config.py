"""The settings of every training on the denoising loss; without torch, so that mistakes show at once."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.precision import Precision

Weighting: TypeAlias = Literal["uniform", "min_snr", "debiased"]


class LossConfig(BaseModel):
    """The settings of every training on the denoising loss; subclasses only change the defaults.

    Attributes:
        seed: of all random draws.
        lr: the peak learning rate.
        clip: the largest norm of a gradient; larger gradients are scaled down to it.
        precision: the number format of the base's forward and backward; `auto` picks what is fast on this
            device. What is trained stays float32.
        prompt: the caption of photos that have none; `{class_word}` is the base's word for people.
        weighting: how much the loss counts at each noise level, see `loss_weights`.
        timestep_bias: draw so many timesteps and keep the noisiest; 1 for no bias.
        class_weight: how much a training holds to the bare base's answers to captions that name the class and
            not the person (`a photo of a face`), so that the class word does not become the person; 0 for
            not at all.
        checkpointing: gradient checkpointing in the denoiser: less memory, a third slower.
        compile_blocks: compile each kind of the denoiser's repeated blocks once, for trainings of hours; a
            person's few steps are over before it pays.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    lr: float = Field(default=1e-3, gt=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Precision = "auto"
    prompt: str = "a photo of a [V] {class_word}"
    weighting: Weighting = "uniform"
    timestep_bias: int = Field(default=1, ge=1)
    class_weight: float = Field(default=0.0, ge=0)
    checkpointing: bool = False
    compile_blocks: bool = False
