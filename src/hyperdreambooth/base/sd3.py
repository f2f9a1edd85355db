"""Stable Diffusion 3 and 3.5: a joint-attention transformer, two CLIPs, and a T5 that may be left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperdreambooth.base import sd
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.noising import Flow
from hyperdreambooth.base.readers import has_reader
from hyperdreambooth.base.text import concatenate, frozen_states, read, token_numbers
from hyperdreambooth.sites import ATTENTION

DENOISER = "transformer"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
SITES = ATTENTION
NOISING = Flow(logit_normal=True)
PATCH = 2
T5_LENGTH = 256  # the pipeline's default, with and without a T5


def _lengths(pipe: Any) -> tuple[int, int, int]:
    """Returns the number of tokens of each tokenizer, 0 for a missing T5."""
    clip = pipe.tokenizer.model_max_length
    return clip, clip, 0 if pipe.tokenizer_3 is None else _t5_length(pipe)


def _t5_length(pipe: Any) -> int:
    return T5_LENGTH if pipe.tokenizer_3 is None else min(T5_LENGTH, pipe.tokenizer_3.model_max_length)


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 77 + 77 + 256)`."""
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
    pairs = zip(tokenizers, _lengths(pipe), strict=True)
    return torch.cat([token_numbers(each, prompts, length) for each, length in pairs if length], dim=1)


def encode_frozen(pipe: Any, tokens: Tensor) -> Tensor | None:
    """Returns T5's states, `(b, t, c)`; None without a T5."""
    if not has_reader(pipe, "text_encoder_3"):
        return None
    return frozen_states(pipe, "text_encoder_3", tokens.split(_lengths(pipe), dim=1)[2])


def encode_prompts(pipe: Any, tokens: Tensor, frozen: Tensor | None = None) -> Conditioning:
    """Returns `hidden (b, t, c)`, padded CLIP states and then T5's, and both projections, `pooled (b, p)`."""
    first, second, _ = tokens.split(_lengths(pipe), dim=1)
    one, two = read(pipe.text_encoder, first), read(pipe.text_encoder_2, second)
    clip = concatenate(one.hidden_states[-2], two.hidden_states[-2])
    width = pipe.transformer.config.joint_attention_dim
    states = encode_frozen(pipe, tokens) if frozen is None else frozen
    t5 = clip.new_zeros(len(clip), _t5_length(pipe), width) if states is None else states.to(clip)
    hidden = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
    return {"hidden": hidden, "pooled": concatenate(one[0], two[0])}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the transformer's predicted velocity, `(b, c, h, w)`."""
    return pipe.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=conditioning["hidden"],
        pooled_projections=conditioning["pooled"],
        return_dict=False,
    )[0]


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for classifier-free guidance, with as many T5 tokens as in training."""
    return {**sd.sampling(pipe, prompts, negative, guidance), "max_sequence_length": _t5_length(pipe)}


def resolution(pipe: Any) -> int:
    """Returns the transformer's own side in pixels."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def multiple(pipe: Any) -> int:
    """Returns the side of a patch of latents in pixels."""
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size
