"""The settings of the training loop."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from hyperdreambooth.base.config import LossConfig
from hyperdreambooth.schedule import Shape

Steps: TypeAlias = Annotated[int, Field(ge=0)] | Literal["auto"]


class TrainConfig(LossConfig):
    """The settings that pre-optimisation, the fast finetune and DreamBooth share.

    Attributes:
        steps: the number of steps; `auto` stops when the loss on fixed noise stops falling (`plateau.py`).
            Commands choose among looks instead where the base has scorers (`looks.py`).
        most: the largest number of steps where `steps` is `auto`.
        schedule: whether the learning rate stays constant after the warm-up or falls to 0 as half a cosine.
        warmup: the steps in which the learning rate rises.
        batch: the samples of a person in each step; one photo fills a batch with different noise and
            timesteps.
        photo_order: `turns` shows a person's photos in turn, so that each is seen equally often; `shuffled`
            draws an order for every step.
        size_weight: the weight of the mean square distance of the trained numbers from where they started.
        background: the weight of the loss outside the oval where an aligned crop has its face. Below 1, less
            of the photo's surroundings leaks into the person.
        prior_weight: the weight of the class images' loss (DreamBooth's prior preservation); 0 for none.
        prior_prompt: the prompt of the class images.
        prior_images: the number of class images.
        save_every: the steps between two checkpoints of a training that has a run folder.
    """

    steps: Steps = 40
    most: int = Field(default=200, ge=1)
    schedule: Shape = "constant"
    warmup: int = Field(default=0, ge=0)
    batch: int = Field(default=4, ge=1)
    photo_order: Literal["turns", "shuffled"] = "turns"
    size_weight: float = Field(default=0.0, ge=0)
    background: float = Field(default=1.0, ge=0, le=1)
    prior_weight: float = Field(default=0.0, ge=0)
    prior_prompt: str = "a photo of a {class_word}"
    prior_images: int = Field(default=32, ge=1)
    save_every: int = Field(default=100, ge=1)

    @property
    def last(self) -> int:
        """The step at which the training ends at the latest."""
        return self.most if self.steps == "auto" else self.steps
