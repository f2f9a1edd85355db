"""The settings of the finetune and of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.config import load_config


class TrainConfig(BaseModel):
    """The loop's fields, shared by the finetune and by DreamBooth.

    Attributes:
        batch: samples a step; one photo fills a batch with different noise and timesteps.
        prompt: caption of photos that have none; `{class_word}` is the base's.
        snr_gamma: γ of min-SNR weighting of the denoising loss (arXiv 2303.09556); 0 for none.
        background: weight of the loss outside the oval where an aligned crop has its face; below 1 less of
            the photo's surroundings leaks into the person.
        prior_weight: weight of the class images' loss (DreamBooth's prior preservation); 0 draws none.
        save_every: steps between two checkpoints, where there is a run folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=40, ge=0)
    lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    batch: int = Field(default=4, ge=1)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    seed: int = 0
    prompt: str = "a photo of a [V] {class_word}"
    snr_gamma: float = Field(default=0.0, ge=0)
    background: float = Field(default=1.0, ge=0, le=1)
    prior_weight: float = Field(default=0.0, ge=0)
    prior_prompt: str = "a photo of a {class_word}"
    prior_images: int = Field(default=32, ge=1)
    save_every: int = Field(default=100, ge=1)


class FinetuneConfig(TrainConfig):
    """Rank-relaxed fast finetuning.

    Attributes:
        rank: rank of the finished LoRA.
        way: `complement` relaxes the prediction and trains all of it; `side_by_side` keeps it frozen, trains
            a LoRA beside it and merges the two afterwards.
        trained_rank: rank of that LoRA; None for what `rank` leaves free, so that merging loses nothing.
            With more the merged LoRA is truncated to `rank`.
    """

    rank: int = Field(default=4, ge=1)
    way: Literal["complement", "side_by_side"] = "complement"
    trained_rank: int | None = Field(default=None, ge=1)

    def over(self, defaults: Mapping[str, Any]) -> Self:
        """The same settings with other defaults, such as a hypernetwork's own: what was set stays.

        Raises:
            InputError: a default that is no field, or a bad value.
        """
        return load_config(type(self), **{**defaults, **self.model_dump(exclude_unset=True)})


class DreamboothConfig(TrainConfig):
    """One person from scratch: `lidb` trains numbers over seeded bases, `lora` an ordinary LoRA."""

    method: Literal["lidb", "lora"] = "lidb"
    steps: int = Field(default=400, ge=0)
    rank: int = Field(default=1, ge=1)
    down_dim: int = Field(default=100, ge=1)
    up_dim: int = Field(default=50, ge=1)
    basis_seed: int = 0
