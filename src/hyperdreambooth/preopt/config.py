"""The settings of `hdb preoptimize`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hyperdreambooth.schedule import Shape
from hyperdreambooth.training.config import TrainConfig


class PreoptConfig(TrainConfig):
    """The settings that make a bank.

    Attributes:
        rank: `r`.
        down_dim: the rows `a` of the bases for down; fewer at sites with fewer inputs.
        up_dim: the columns `d` of the bases for up; fewer at sites with fewer outputs.
        basis_seed: the seed of the aux bases.
        identities_per_batch: the people who are trained together; only speed and memory depend on it.
        batch: the samples of a person in each step.
        text_encoder: whether the text encoders are adapted too; if not, each caption is encoded once.
    """

    rank: int = Field(default=1, ge=1)
    down_dim: int = Field(default=100, ge=1)
    up_dim: int = Field(default=50, ge=1)
    basis_seed: int = 0
    steps: Annotated[int, Field(ge=1)] | Literal["auto"] = 300
    schedule: Shape = "cosine"
    warmup: int = Field(default=10, ge=0)
    identities_per_batch: int = Field(default=32, ge=1)
    batch: int = Field(default=1, ge=1)
    photo_order: Literal["turns", "shuffled"] = "shuffled"
    text_encoder: bool = True
    prompt: str = "a [V] {class_word}"

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.rank > min(self.down_dim, self.up_dim):
            raise ValueError(f"rank {self.rank} needs down_dim and up_dim of at least {self.rank}")
        return self
