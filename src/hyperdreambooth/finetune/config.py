"""The settings of the finetune and of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hyperdreambooth.config import load_config
from hyperdreambooth.training.config import Steps, TrainConfig


class FinetuneConfig(TrainConfig):
    """The settings of the rank-relaxed fast finetune.

    Attributes:
        rank: the rank of the finished LoRA.
        way: `complement` relaxes the prediction and trains all of it. `side_by_side` keeps the prediction
            frozen, trains a LoRA beside it and merges the two afterwards.
        trained_rank: the rank of that LoRA; None for what `rank` leaves free, so that merging loses nothing.
            With more, the merged LoRA is truncated to `rank`.
    """

    rank: int = Field(default=4, ge=1)
    way: Literal["complement", "side_by_side"] = "complement"
    trained_rank: int | None = Field(default=None, ge=1)

    def over(self, defaults: Mapping[str, Any]) -> Self:
        """Returns these settings over other defaults, such as a hypernetwork's own.

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
"""The defaults of each method: numbers over bases bear learning rates that would ruin the base's own weights.

The paper names steps but no learning rates; these are common for Stable Diffusion 1.5.
"""


class DreamboothConfig(TrainConfig):
    """The settings of DreamBooth from scratch; the defaults depend on the method (`USUAL`).

    Attributes:
        method: `lidb` trains numbers over seeded bases, `lora` an ordinary LoRA, `full` the base's own
            weights, `textual-inversion` the embedding of one word.
        rank: the rank of a LiDB or LoRA.
        down_dim: the rows of a LiDB's basis for down, `a`.
        up_dim: the columns of a LiDB's basis for up, `d`.
        basis_seed: the seed of a LiDB's bases.
        text_encoder: whether `full` trains the text encoders too.
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
        """Puts the method's own defaults under the settings that were given."""
        return {**USUAL.get(str(given.get("method", "lidb")), {}), **given}
