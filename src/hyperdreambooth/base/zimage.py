"""Z-Image: a single stream transformer over pictures and captions, whose text encoder is Qwen3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base import qwen
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.flux import multiple
from hyperdreambooth.base.noising import Flow

__all__ = ["multiple"]  # the same as for Flux

DENOISER = "transformer"
TEXT_ENCODERS: tuple[str, ...] = ()
SITES = r"\.attention\.to_(q|k|v|out\.0)$"
NOISING = Flow(logit_normal=True)
PATCH = 2
LENGTH = 512  # the pipeline's default


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 512)`."""
    return qwen.chat_tokens(pipe.tokenizer, prompts, LENGTH, thinking=True)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """Returns the states of the last layer but one, `hidden (b, t, c)`, and `mask (b, t)`."""
    states, mask = qwen.layer_states(pipe, tokens, (-2,), trim=True)
    return {"hidden": states.squeeze(2), "mask": mask}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the predicted velocity, `(b, c, h, w)`.

    The transformer takes lists, its time runs from noise (0) to picture (1), and its velocity likewise.
    """
    lengths = conditioning["mask"].sum(dim=1).tolist()
    captions = [row[:length] for row, length in zip(conditioning["hidden"], lengths, strict=True)]
    time = 1 - timesteps / pipe.scheduler.config.num_train_timesteps
    pictures = list(noisy.unsqueeze(2).unbind())
    answers = pipe.transformer(pictures, time, captions, return_dict=False)[0]
    return -torch.stack(answers).squeeze(2)


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for classifier-free guidance, which the pipeline counts from 0 and not from 1."""
    # the pipeline writes its chat into the list that it is given
    negatives = None if negative is None else [*negative]
    texts = {"prompt": [*prompts], "negative_prompt": negatives, "max_sequence_length": LENGTH}
    return {**texts, "guidance_scale": guidance - 1}


def resolution(pipe: Any) -> int:
    """Returns the pipeline's default side in pixels, as the transformer has none."""
    return 1024
