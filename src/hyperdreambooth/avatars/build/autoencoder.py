"""The avatars' VAE: 128 pixels → 16×16×24 latents, trained on crops.

It learns twelve channels first, and then twelve more. At the end all are scaled to one precision, so that an
error of the base is worth the same in every channel. `decoder.py` sharpens it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit, read_all
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.build.untyped import diffusers
from hyperdreambooth.runs import rng

CROP = 64
KL, HOLD, DECIBEL = 1e-4, 0.05, 8e-3  # weights of the losses besides the pixels' error
COARSE_CHANNELS = 12
LATENT_CHANNELS = 24


def new_vae(seed: int, channels: int = COARSE_CHANNELS) -> Any:
    """Returns a fully convolutional `AutoencoderKL`; without attention it can be trained on crops."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    # A posterior that starts as wide as its mean would hide the picture for the first thousand steps.
    torch.nn.init.constant_(vae.quant_conv.bias[channels:], -6.0)
    return vae


@torch.no_grad()
def widen(vae: Any, seed: int) -> Any:
    """Returns the VAE with more channels: its own come first, and its decoder ignores the new ones."""
    wide, known = new_vae(seed, LATENT_CHANNELS), vae.state_dict()
    state, means = wide.state_dict(), torch.arange(vae.config.latent_channels)
    both = torch.cat([means, LATENT_CHANNELS + means])  # means and log-variances
    every = torch.arange(wide.config.block_out_channels[-1])
    for name, value in known.items():
        if value.shape == state[name].shape:
            state[name].copy_(value)
    for layer, rows, columns in (
        ("encoder.conv_out", both, every),
        ("quant_conv", both, both),
        ("post_quant_conv", means, means),
        ("decoder.conv_in", every, means),
    ):
        state[f"{layer}.weight"][rows] = 0
        state[f"{layer}.weight"][rows[:, None], columns] = known[f"{layer}.weight"]
        state[f"{layer}.bias"][rows] = known[f"{layer}.bias"]
    return wide


def train_vae(pictures: Pictures, config: StageConfig, folder: Path, device: str) -> Any:
    """Trains the VAE on the absolute and squared error of pixels and a small KL term."""
    vae = new_vae(config.seed).to(device)

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        posterior = vae.encode(pixels).latent_dist
        off = vae.decode(posterior.sample()).sample.float() - pixels
        absolute, squared, kl = off.abs().mean(), off.square().mean(), _kl(posterior)
        loss = absolute + 8 * squared + KL * kl
        return {"loss": loss, "absolute": absolute, "squared": squared, "kl": kl}

    fit("vae", vae, lambda step: {"pixels": crops(pictures, config, step)}, loss_of, config, folder, device)
    return vae


def train_wide_vae(vae: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str) -> Any:
    """Trains a VAE of twice the channels on the signal-to-noise ratio, so that neon does not outweigh faces.

    The channels of `vae` are kept close to their present values, so that the new ones carry what is missing.
    """
    coarse = vae.requires_grad_(False).to(device).eval()
    wide, channels = widen(coarse, config.seed).to(device), coarse.config.latent_channels

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        posterior = wide.encode(pixels).latent_dist
        with torch.no_grad():
            held = coarse.encode(pixels).latent_dist.mode().float()
        drift = (posterior.mean[:, :channels].float() - held).square().mean()
        squared = (wide.decode(posterior.sample()).sample.float() - pixels).square().mean(dim=(1, 2, 3))
        decibel, kl = (10 * torch.log10(4 / squared)).mean(), _kl(posterior)
        loss = HOLD * drift + KL * kl - DECIBEL * decibel
        return {"loss": loss, "decibel": decibel, "drift": drift, "kl": kl}

    fit("wide", wide, lambda step: {"pixels": crops(pictures, config, step)}, loss_of, config, folder, device)
    even_precision(wide, pictures, device)
    return wide


def latents_of(vae: Any, pictures: Pictures, file: Path, device: str) -> Tensor:
    """Returns scaled latents `(m, c, 16, 16)` float16 of all pictures, from `file` if it exists."""

    def read(pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor

    return read_all(pictures, read, file, device)


def cut(pictures: Tensor, corners: Tensor, side: int) -> Tensor:
    """Cuts a square out of each picture `(b, c, h, w)`, from its corner `(b, 2)` on."""
    places = zip(pictures, corners.tolist(), strict=True)
    return torch.stack([one[:, y : y + side, x : x + side] for one, (y, x) in places])


def _kl(posterior: Any) -> Tensor:
    return posterior.kl().float().mean() / posterior.mean[0].numel()


def crops(pictures: Pictures, config: StageConfig, step: int) -> Tensor:
    """Returns random crops `(b, 3, 64, 64)`, a function of seed and step."""
    generator = rng("vae", config.seed, step)
    rows = torch.randint(0, len(pictures), (config.batch,), generator=generator)
    pixels = pictures.batch(rows)
    corners = torch.randint(0, pixels.shape[-1] - CROP + 1, (config.batch, 2), generator=generator)
    return cut(pixels, corners, CROP)


@torch.no_grad()
def even_precision(vae: Any, pictures: Pictures, device: str) -> None:
    """Scales and shifts the channels, in the 1×1 convolutions; pictures stay what they are, to rounding.

    The standard deviation of the posterior says how exactly the decoder needs a channel. It becomes the same
    in all of them. Latents get a mean of 0 in each channel and a mean square of 1 over all.
    """
    rows = torch.arange(0, len(pictures), max(1, len(pictures) // 256))[:256]
    found = [vae.encode(pictures.batch(part).to(device)).latent_dist for part in rows.split(32)]
    mean = torch.cat([one.mean for one in found])
    precision = torch.cat([one.var for one in found]).mean(dim=(0, 2, 3)).rsqrt()
    shift, spread = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3), correction=0)
    scale = precision / (spread * precision).square().mean().sqrt()
    channels, into, back = len(scale), vae.quant_conv, vae.post_quant_conv
    into.bias[:channels].sub_(shift).mul_(scale)
    into.weight[:channels].mul_(scale.view(-1, 1, 1, 1))
    into.bias[channels:].add_(2 * scale.log())
    back.bias.add_(back.weight.flatten(1) @ shift)
    back.weight.div_(scale.view(1, -1, 1, 1))


@torch.no_grad()
def through(vae: Any, pixels: Tensor) -> Tensor:
    """Returns pixels `(b, 3, h, w)` in [-1, 1] as they come out of the VAE."""
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)


@torch.no_grad()
def psnr(vae: Any, pictures: Pictures, device: str) -> float:
    """Returns the mean peak signal-to-noise ratio, in dB, of whole pictures after the VAE."""
    values: list[Tensor] = []
    for rows in torch.arange(len(pictures)).split(32):
        pixels = pictures.batch(rows).to(device)
        values.append(10 * torch.log10(4 / (through(vae, pixels) - pixels).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(values).mean())
