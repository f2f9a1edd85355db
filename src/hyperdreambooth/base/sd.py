"""Stable Diffusion 1.x / 2.x: what differs from other families, as plain functions over its pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperdreambooth.shapes import Site, canonical

Conditioning = dict[str, Tensor]

DENOISER = "unet"
TEXT_ENCODERS = ("text_encoder",)
_UNET_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def components(pipe: Any) -> dict[str, nn.Module]:
    """The modules an adapter can be worn by."""
    return {name: getattr(pipe, name) for name in (DENOISER, *TEXT_ENCODERS)}


def sites(pipe: Any) -> tuple[Site, ...]:
    """Every self- and cross-attention projection of UNet and text encoder (paper, section 4.1)."""
    found = [*_linears(DENOISER, pipe.unet, _UNET_PROJECTIONS)]
    for name in TEXT_ENCODERS:
        found += _linears(name, getattr(pipe, name), _TEXT_PROJECTIONS)
    return tuple(sorted(found))


def _linears(component: str, module: nn.Module, endings: tuple[str, ...]) -> list[Site]:
    return [
        Site(canonical(component, path), layer.in_features, layer.out_features)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and path.endswith(tuple(f".{end}" for end in endings))
        and "attn" in path
    ]


def tokenize(pipe: Any, prompts: list[str]) -> Tensor:
    """Token numbers `(b, t)`, padded to the tokenizer's length and cut there."""
    encoded = pipe.tokenizer(
        prompts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids


def encode_prompts(pipe: Any, tokens: Tensor) -> Conditioning:
    """The text encoder's last hidden state `(b, t, c)`; gradients flow when it wears trained factors."""
    return {"hidden": pipe.text_encoder(tokens)[0]}


def encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    """Pixels `(b, 3, h, w)` in [-1, 1] → scaled latents `(b, c, h/8, w/8)`: the mode, so it can be cached."""
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Scaled latents → pixels `(b, 3, h, w)` in [-1, 1]."""
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)


def predict(pipe: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet's output for noisy latents `(b, c, h, w)` at timesteps `(b,)`."""
    return pipe.unet(noisy, timesteps, encoder_hidden_states=conditioning["hidden"], return_dict=False)[0]


def alphas_cumprod(pipe: Any, device: torch.device) -> Tensor:
    """ᾱ_t of the training schedule, `(1000,)`."""
    return pipe.scheduler.alphas_cumprod.to(device)
