"""Flux: a transformer over packed latents with guidance as an input, CLIP's pooled vector, and T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.noising import Flow
from hyperdreambooth.base.text import frozen_states, read, token_numbers
from hyperdreambooth.sites import ATTENTION

DENOISER = "transformer"
TEXT_ENCODERS = ("text_encoder",)
SITES = ATTENTION
NOISING = Flow(logit_normal=False)
PATCH = 2
T5_LENGTH = 512  # the pipeline's default
# at 1 the distilled model predicts the plain velocity, which is the target of the loss
GUIDANCE = 1.0


def _lengths(pipe: Any) -> tuple[int, int]:
    """Returns the number of tokens of each tokenizer."""
    return pipe.tokenizer.model_max_length, min(T5_LENGTH, pipe.tokenizer_2.model_max_length)


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 77 + 512)`."""
    pairs = zip((pipe.tokenizer, pipe.tokenizer_2), _lengths(pipe), strict=True)
    return torch.cat([token_numbers(each, prompts, length) for each, length in pairs], dim=1)


def encode_frozen(pipe: Any, tokens: Tensor) -> Tensor:
    """Returns T5's states, `(b, t, c)`."""
    return frozen_states(pipe, "text_encoder_2", tokens.split(_lengths(pipe), dim=1)[1])


def encode_prompts(pipe: Any, tokens: Tensor, frozen: Tensor | None = None) -> Conditioning:
    """Returns T5's states, `hidden (b, t, c)`, and CLIP's pooled vector, `pooled (b, p)`."""
    pooled = read(pipe.text_encoder, tokens.split(_lengths(pipe), dim=1)[0]).pooler_output
    states = encode_frozen(pipe, tokens) if frozen is None else frozen
    hidden = states.to(pooled.device, pooled.dtype)
    return {"hidden": hidden, "pooled": pooled}


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """Returns the place of every patch, `(h · w, 3)`, made where `like` lies; the first column is 0."""
    rows, columns = (torch.arange(side, device=like.device) for side in (height, width))
    return torch.cartesian_prod(rows[:1], rows, columns).to(like.dtype)


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the predicted velocity, `(b, c, h, w)`; the transformer takes 2 x 2 patches and positions."""
    b, c, h, w = noisy.shape
    hidden, guided = conditioning["hidden"], pipe.transformer.config.guidance_embeds
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, b, c, h, w),
        timestep=timesteps / pipe.scheduler.config.num_train_timesteps,
        guidance=torch.full((b,), GUIDANCE, device=noisy.device) if guided else None,
        pooled_projections=conditioning["pooled"],
        encoder_hidden_states=hidden,
        txt_ids=hidden.new_zeros(hidden.shape[1], 3),
        img_ids=_positions(h // 2, w // 2, hidden),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(packed, h, w, 1)


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for guidance: the model's own, or with a negative prompt classifier-free."""
    common = {"prompt": prompts, "max_sequence_length": _lengths(pipe)[1]}
    if negative is None:
        return {**common, "guidance_scale": guidance}
    return {**common, "negative_prompt": negative, "true_cfg_scale": guidance, "guidance_scale": GUIDANCE}


def resolution(pipe: Any) -> int:
    """Returns the pipeline's default side in pixels, as the transformer has none."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def multiple(pipe: Any) -> int:
    """Returns the side of a packed 2 x 2 square of latents in pixels."""
    return 2 * pipe.vae_scale_factor
