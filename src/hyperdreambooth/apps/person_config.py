"""The configs of the commands that make a person. They are read before torch is imported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from hyperdreambooth.evaluate.config import PROMPTS
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig


class Drawing(BaseModel):
    """How pictures of the person are generated and judged.

    Attributes:
        prompts: `[V]` is the person and `{class_word}` the base's class word.
        draw_steps: the denoising steps.
        guidance: the scale of classifier-free guidance.
        hold_out: whether the last of several photos is left out of the training to judge identity, where the
            base's scorers or the extra `judge` can.
    """

    prompts: tuple[str, ...] = Field(PROMPTS, min_length=1)
    draw_steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)
    hold_out: bool = True


class PersonalizeConfig(Drawing, FinetuneConfig):
    """The config of `personalize` and `demo`: that of the finetune, and how pictures are generated.

    Attributes:
        method: `hypernetwork`; or `lora` or `lidb`, which train from scratch (`ScratchConfig`).
        finetune_strange: also finetune photos that are far from those of the hypernetwork's training; they
            often become blots.
    """

    method: Literal["hypernetwork", "lora", "lidb"] = "hypernetwork"
    finetune_strange: bool = False
    save_every: int = Field(10, ge=1)


class ScratchConfig(Drawing, DreamboothConfig):
    """The config of `dreambooth`: that of the training, and how pictures are generated."""
