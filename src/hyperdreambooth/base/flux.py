"""Flux: a transformer over packed latents, CLIP for one vector, T5 for the words, guidance as an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.noising import Flow
from hyperdreambooth.base.text import frozen_states, read, token_numbers

DENOISER = "transformer"
TEXT_ENCODERS = ("text_encoder",)
NOISING = Flow(logit_normal=False)
T5_LENGTH = 512  # the pipeline's own
GUIDANCE = (
    1.0  # at 1 the distilled model answers with the plain velocity, which is what the loss compares with
)


def _lengths(pipe: Any) -> tuple[int, int]:
    """Tokens of each tokenizer."""
    return pipe.tokenizer.model_max_length, min(T5_LENGTH, pipe.tokenizer_2.model_max_length)


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Token numbers `(b, 77 + 512)`."""
    pairs = zip((pipe.tokenizer, pipe.tokenizer_2), _lengths(pipe), strict=True)
    return torch.cat([token_numbers(each, prompts, length) for each, length in pairs], dim=1)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """T5's states, `hidden (b, t, c)`, and CLIP's vector, `pooled (b, p)`."""
    first, second = tokens.split(_lengths(pipe), dim=1)
    pooled = read(pipe.text_encoder, first).pooler_output
    hidden = frozen_states(pipe.text_encoder_2, second).to(pooled.device, pooled.dtype)
    return {"hidden": hidden, "pooled": pooled}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The transformer's velocity, `(b, c, h, w)`; it reads patches of 2 x 2 with their places."""
    b, c, h, w = noisy.shape
    hidden = conditioning["hidden"]
    guidance = None
    if pipe.transformer.config.guidance_embeds:
        guidance = torch.full((b,), GUIDANCE, device=noisy.device)
    answer = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, b, c, h, w),
        timestep=timesteps / pipe.scheduler.config.num_train_timesteps,
        guidance=guidance,
        pooled_projections=conditioning["pooled"],
        encoder_hidden_states=hidden,
        txt_ids=hidden.new_zeros(hidden.shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, hidden.dtype),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(answer, h, w, 1)


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Guidance as the model's input; with a negative prompt true guidance against it instead."""
    common = {"prompt": prompts, "max_sequence_length": _lengths(pipe)[1]}
    if negative is None:
        return {**common, "guidance_scale": guidance}
    return {**common, "negative_prompt": negative, "true_cfg_scale": guidance, "guidance_scale": GUIDANCE}


def resolution(pipe: Any) -> int:
    """Its transformer has no size of its own; the pipeline knows."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def multiple(pipe: Any) -> int:
    """Latents are packed in squares of four."""
    return 2 * pipe.vae_scale_factor
