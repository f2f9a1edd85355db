"""The settings of the finetune and of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hyperdreambooth.base.denoise import Weighting
from hyperdreambooth.config import load_config
from hyperdreambooth.precision import Precision

Steps: TypeAlias = Annotated[int, Field(ge=0)] | Literal["auto"]


class TrainConfig(BaseModel):
    """The loop's fields, shared by the finetune and by DreamBooth.

    Attributes:
        precision: of the base's forward and backward; `auto` is what is fast here.
        steps: how many; `auto` stops when the loss on fixed noise stops falling (`plateau.py`).
        most: steps at most where `steps` is `auto`.
        batch: samples a step; one photo fills a batch with different noise and timesteps.
        prompt: caption of photos that have none; `{class_word}` is the base's.
        weighting: how much the denoising loss counts at each noise level, see `base.denoise.loss_weights`.
        background: weight of the loss outside the oval where an aligned crop has its face; below 1 less of
            the photo's surroundings leaks into the person.
        prior_weight: weight of the class images' loss (DreamBooth's prior preservation); 0 draws none.
        timestep_bias: a step takes the noisiest of so many timesteps, see `denoise.sample_noise`; 1 for none.
        checkpointing: gradient checkpointing in the base's denoiser: less memory, a third slower.
        save_every: steps between two checkpoints, where there is a run folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Steps = 40
    most: int = Field(default=200, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    batch: int = Field(default=4, ge=1)
    clip: float = Field(default=1.0, gt=0)
    precision: Precision = "float32"
    seed: int = 0
    prompt: str = "a photo of a [V] {class_word}"
    weighting: Weighting = "uniform"
    timestep_bias: int = Field(default=1, ge=1)
    checkpointing: bool = False
    background: float = Field(default=1.0, ge=0, le=1)
    prior_weight: float = Field(default=0.0, ge=0)
    prior_prompt: str = "a photo of a {class_word}"
    prior_images: int = Field(default=32, ge=1)
    save_every: int = Field(default=100, ge=1)

    @property
    def last(self) -> int:
        """The step that a training ends at, at the latest."""
        return self.most if self.steps == "auto" else self.steps


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


USUAL: Mapping[str, Mapping[str, Any]] = {
    "lidb": {"steps": 400, "lr": 1e-3},
    "lora": {"steps": 400, "lr": 1e-4, "batch": 1, "rank": 4},
    "full": {"steps": 1200, "lr": 5e-6, "batch": 1},
    "textual-inversion": {"steps": 1000, "lr": 5e-3},
}
"""What each method takes where nothing else is said: numbers over bases bear what would ruin all weights.

The paper names steps, no learning rates; these are common for Stable Diffusion 1.5.
"""


class DreamboothConfig(TrainConfig):
    """One person from scratch; defaults are those of the method (`USUAL`).

    Attributes:
        method: `lidb` trains numbers over seeded bases, `lora` an ordinary LoRA, `full` the base's own
            weights, `textual-inversion` the vector of one word.
        text_encoder: whether `full` trains the text encoder too.
    """

    method: Literal["lidb", "lora", "full", "textual-inversion"] = "lidb"
    steps: Steps = 400
    rank: int = Field(default=1, ge=1)
    down_dim: int = Field(default=100, ge=1)
    up_dim: int = Field(default=50, ge=1)
    basis_seed: int = 0
    text_encoder: bool = True

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The method's own defaults under what was given."""
        return {**USUAL.get(str(given.get("method", "lidb")), {}), **given}
