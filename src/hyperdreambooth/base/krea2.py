"""Krea 2: a single stream over packed latents and the states of twelve layers of Qwen3-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.base import qwen
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.flux import multiple
from hyperdreambooth.base.noising import Flow
from hyperdreambooth.base.zimage import resolution

__all__ = ["multiple", "resolution"]  # the same as for Flux and Z-Image

DENOISER = "transformer"
TEXT_ENCODERS: tuple[str, ...] = ()
# not those of the text fusion: it attends over layers, so its batch is one of tokens
SITES = r"\.transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0|gate)$"
NOISING = Flow(logit_normal=True)
PATCH = 2
LENGTH = 512  # the pipeline's default


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 34 + 512)`: the instruction, the padded caption, and the end of the turn."""
    suffix = pipe.tokenizer(pipe.prompt_template_encode_suffix, return_tensors="pt").input_ids
    length = pipe.prompt_template_encode_start_idx + LENGTH - pipe.prompt_template_encode_num_suffix_tokens
    texts = [pipe.prompt_template_encode_prefix + prompt for prompt in prompts]
    tokens = qwen.padded_tokens(pipe.tokenizer, texts, length)
    return torch.cat([tokens, suffix.expand(len(tokens), -1)], dim=1)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """Returns the states of the chosen layers, `hidden (b, t, layers, c)`, and `mask (b, t)`."""
    start, layers = pipe.prompt_template_encode_start_idx, pipe.text_encoder_select_layers
    states, mask = qwen.layer_states(pipe, tokens, layers, trim=True, axes=3)
    return {"hidden": states[:, start:], "mask": mask[:, start:]}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the predicted velocity, `(b, c, h, w)`; the transformer takes 2 x 2 patches of latents."""
    (b, c, h, w), hidden = noisy.shape, conditioning["hidden"]
    rows, columns, scale = h // PATCH, w // PATCH, pipe.vae_scale_factor
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, b, c, h, w),
        encoder_hidden_states=hidden,
        timestep=timesteps / pipe.scheduler.config.num_train_timesteps,
        position_ids=pipe.prepare_position_ids(hidden.shape[1], rows, columns, noisy.device),
        encoder_attention_mask=conditioning["mask"].to(noisy.device),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(packed, h * scale, w * scale).squeeze(2)


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for classifier-free guidance, which the pipeline counts from 0 and not from 1."""
    texts = {"prompt": [*prompts], "negative_prompt": negative, "max_sequence_length": LENGTH}
    return {**texts, "guidance_scale": 0.0 if pipe.config.is_distilled else guidance - 1}
