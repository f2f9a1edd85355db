"""Qwen-Image: joint streams over packed latents, whose text encoder is Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperdreambooth.base import qwen
from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.flux import multiple, resolution
from hyperdreambooth.base.noising import Flow

__all__ = ["multiple", "resolution"]  # the same as for Flux

DENOISER = "transformer"
TEXT_ENCODERS: tuple[str, ...] = ()
SITES = r"\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
NOISING = Flow(logit_normal=True)
PATCH = 2
LENGTH = 512  # a caption's; the pipeline itself would take 1,024


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 34 + 512)`, those of the instruction first."""
    texts = [pipe.prompt_template_encode.format(prompt) for prompt in prompts]
    return qwen.padded_tokens(pipe.tokenizer, texts, pipe.prompt_template_encode_start_idx + LENGTH)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """Returns the last states of the caption, `hidden (b, t, c)`, and `mask (b, t)`."""
    start = pipe.prompt_template_encode_start_idx
    states, mask = qwen.layer_states(pipe, tokens, (-1,), trim=True)
    return {"hidden": states[:, start:].squeeze(2), "mask": mask[:, start:]}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the predicted velocity, `(b, c, h, w)`; the transformer takes 2 x 2 patches of latents."""
    (b, c, h, w), scale = noisy.shape, pipe.vae_scale_factor
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, b, c, h, w),
        timestep=timesteps / pipe.scheduler.config.num_train_timesteps,
        encoder_hidden_states=conditioning["hidden"],
        encoder_hidden_states_mask=conditioning["mask"].to(noisy.device),
        img_shapes=[[(1, h // PATCH, w // PATCH)]] * b,
        return_dict=False,
    )[0]
    return pipe._unpack_latents(packed, h * scale, w * scale, scale).squeeze(2)


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for classifier-free guidance, against a blank where there is nothing negative."""
    texts = {"prompt": [*prompts], "max_sequence_length": LENGTH}
    if guidance <= 1:
        return {**texts, "true_cfg_scale": 1.0}
    return {**texts, "negative_prompt": negative or [" "] * len(prompts), "true_cfg_scale": guidance}
