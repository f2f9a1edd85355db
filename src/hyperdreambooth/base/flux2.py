"""FLUX.2 klein: double and single streams over normalised patches of latents, whose text encoder is Qwen3."""

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
# the single streams have one fused projection in and one out
SITES = r"\.attn\.(to_[qkv]|to_out(\.0)?|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$"
NOISING = Flow(logit_normal=True)
PATCH = 1  # its latents are patches already
LENGTH = 512  # the pipeline's default
LAYERS = (9, 18, 27)  # of the text encoder, whose states stand side by side


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 512)`."""
    return qwen.chat_tokens(pipe.tokenizer, prompts, LENGTH, thinking=False)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """Returns the states of three layers, `hidden (b, t, 3c)`; the transformer sees those of padding, too."""
    return {"hidden": qwen.layer_states(pipe, tokens, LAYERS, trim=False)[0].flatten(2)}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the predicted velocity, `(b, c, h, w)`; every latent is a token with a position."""
    hidden = conditioning["hidden"]
    packed = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy),
        timestep=timesteps / pipe.scheduler.config.num_train_timesteps,
        guidance=None,
        encoder_hidden_states=hidden,
        txt_ids=pipe._prepare_text_ids(hidden).to(noisy.device),
        img_ids=pipe._prepare_latent_ids(noisy).to(noisy.device),
        return_dict=False,
    )[0]
    return packed.mT.reshape(noisy.shape)


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for classifier-free guidance, which a distilled model is drawn without."""
    texts: dict[str, Any] = {"prompt": [*prompts], "max_sequence_length": LENGTH}
    if pipe.config.is_distilled or guidance <= 1:
        return {**texts, "guidance_scale": 1.0}
    if negative is not None:  # the pipeline takes it encoded only
        texts["negative_prompt_embeds"] = encode_prompts(pipe, tokenize(pipe, negative))["hidden"]
    return {**texts, "guidance_scale": guidance}
