"""Stable Diffusion 1.x and 2.x: a U-Net, one CLIP text encoder, noise or velocity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.noising import Diffusion
from hyperdreambooth.base.text import token_numbers

DENOISER = "unet"
TEXT_ENCODERS = ("text_encoder",)
NOISING = Diffusion()


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Token numbers `(b, 77)`."""
    return token_numbers(pipe.tokenizer, prompts, pipe.tokenizer.model_max_length)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """The text encoder's last hidden state, `hidden (b, t, c)`."""
    return {"hidden": pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0]}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The U-Net's answer, `(b, c, h, w)`."""
    return pipe.unet(noisy, timesteps, encoder_hidden_states=conditioning["hidden"], return_dict=False)[0]


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Classifier-free guidance against the negative prompt, or against none."""
    del pipe
    return {"prompt": prompts, "negative_prompt": negative, "guidance_scale": guidance}


def resolution(pipe: Any) -> int:
    """The U-Net's own side: 512, or 768 of some 2.x."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def multiple(pipe: Any) -> int:
    """The pipeline refuses other sides."""
    del pipe
    return 8
