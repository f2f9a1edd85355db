"""Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or velocity, and one CLIP text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperdreambooth.base.family import Conditioning
from hyperdreambooth.base.noising import Diffusion
from hyperdreambooth.base.text import token_numbers
from hyperdreambooth.sites import ATTENTION

DENOISER = "unet"
TEXT_ENCODERS = ("text_encoder",)
SITES = ATTENTION
NOISING = Diffusion()
PATCH = 1
RESCALE = 0.7  # the value of arXiv 2305.08891, section 3.4


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Returns token ids `(b, 77)`."""
    return token_numbers(pipe.tokenizer, prompts, pipe.tokenizer.model_max_length)


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """Returns the text encoder's last hidden state, `hidden (b, t, c)`."""
    return {"hidden": pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0]}


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Returns the U-Net's prediction, `(b, c, h, w)`."""
    return pipe.unet(noisy, timesteps, encoder_hidden_states=conditioning["hidden"], return_dict=False)[0]


def sampling(pipe: Any, prompts: list[str], negative: list[str] | None, guidance: float) -> dict[str, Any]:
    """Returns the arguments for classifier-free guidance, with or without a negative prompt.

    If sampling starts from noise alone, guidance makes light and colours too strong. Then it is rescaled
    (arXiv 2305.08891, section 3.4).
    """
    options = {"prompt": prompts, "negative_prompt": negative, "guidance_scale": guidance}
    if pipe.scheduler.config.get("rescale_betas_zero_snr"):
        options["guidance_rescale"] = RESCALE
    return options


def resolution(pipe: Any) -> int:
    """Returns the U-Net's own side in pixels: 512, or 768 for some 2.x."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def multiple(pipe: Any) -> int:
    """Returns 8, as the pipeline refuses other sides."""
    return 8
