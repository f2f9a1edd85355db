"""Stable Diffusion XL: a U-Net conditioned on sizes and crops, too, and two CLIP text encoders."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.noising import Diffusion
from hyperdreambooth.base.sd import multiple, resolution, sampling
from hyperdreambooth.base.text import concatenate, read, token_numbers
from hyperdreambooth.sites import ATTENTION

__all__ = ["multiple", "resolution", "sampling"]  # the same as for the earlier models

DENOISER = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
SITES = ATTENTION
NOISING = Diffusion()
PATCH = 1


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 77 + 77)`, as the tokenizers pad differently."""
    both = (pipe.tokenizer, pipe.tokenizer_2)
    return torch.cat([token_numbers(each, prompts, each.model_max_length) for each in both], dim=1)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """Returns both penultimate states, `hidden (b, t, c)`, and the second projection, `pooled (b, p)`."""
    first, second = tokens.split((pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length), dim=1)
    one, two = read(pipe.text_encoder, first), read(pipe.text_encoder_2, second)
    return {"hidden": concatenate(one.hidden_states[-2], two.hidden_states[-2]), "pooled": two[0]}


@lru_cache(maxsize=8)
def _sizes(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the sizes that condition the U-Net, `(6,)`; made once, as each copy makes the host wait."""
    return torch.tensor([height, width, 0, 0, height, width], device=device, dtype=dtype)


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the U-Net's prediction, conditioned on uncropped images of this size, as in sampling."""
    pooled = conditioning["pooled"]
    height, width = (side * pipe.vae_scale_factor for side in noisy.shape[-2:])
    sizes = _sizes(height, width, noisy.device, pooled.dtype)
    added = {"text_embeds": pooled, "time_ids": sizes.expand(len(noisy), -1)}
    states = {"encoder_hidden_states": conditioning["hidden"], "added_cond_kwargs": added}
    return pipe.unet(noisy, timesteps, **states, return_dict=False)[0]
