"""The settings of `hdb personalize` and `hdb demo`."""

from __future__ import annotations

from pydantic import Field

from hyperdreambooth.evaluate.config import PROMPTS
from hyperdreambooth.finetune.config import FinetuneConfig


class PersonalizeConfig(FinetuneConfig):
    """The config of `personalize` and `demo`: that of the finetune, and how pictures are generated.

    In the prompts `[V]` is the person and `{class_word}` the base's class word.
    """

    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1)
    draw_steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)
