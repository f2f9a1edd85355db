"""The last stage of the avatars' VAE: crisp lines, from latents that are a little off, as the base's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from hyperdreambooth.avatars.build.autoencoder import CROP, DECIBEL, cut, latents_of
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.runs import rng

EDGE, CRITIC = 0.1, 0.02  # weights of the losses besides the signal-to-noise ratio
NOISE = 0.2  # at most, in latents of mean square 1


class Opposed(torch.autograd.Function):
    """Passes values on, and turns their gradient round: who made them wants the opposite."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def new_critic(seed: int) -> nn.Module:
    """Returns a network that says of each part of a picture how real it looks, `(b, 1, h/4 - 2, w/4 - 2)`."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2)]
    for width, stride in ((32, 2), (64, 1)):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(128, 1, 4, 1, 1))


def train_decoder(vae: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str) -> Any:
    """Trains the decoder alone, so that latents stay what they are.

    A critic learns to tell crops from what the decoder makes of them, and the decoder to deceive it (hinge
    loss on parts of pictures, arXiv 2012.09841, section 3.1). One backward pass serves both.
    """
    latents = latents_of(vae, pictures, folder / "latents.safetensors", device)
    parts = {
        "decoder": vae.decoder,
        "post_quant_conv": vae.post_quant_conv,
        "critic": new_critic(config.seed),
    }
    model = nn.ModuleDict(parts).float().requires_grad_(True).to(device)

    def batch_of(step: int) -> Tensors:
        generator = rng("decoder", config.seed, step)
        rows = torch.randint(0, len(pictures), (config.batch,), generator=generator)
        side, scale = CROP // 8, pictures.pixels[0].shape[1] // latents.shape[-1]
        corners = torch.randint(0, latents.shape[-1] - side + 1, (config.batch, 2), generator=generator)
        clean = cut(latents[rows].float(), corners, side)
        off = NOISE * torch.rand(config.batch, 1, 1, 1, generator=generator)
        noisy = clean + off * torch.randn(clean.shape, generator=generator)
        return {"latents": noisy, "pixels": cut(pictures.batch(rows), corners * scale, CROP)}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        drawn = model["decoder"](model["post_quant_conv"](batch["latents"])).float()
        squared = (drawn - pixels).square().mean(dim=(1, 2, 3))
        decibel = (10 * torch.log10(4 / squared)).mean()
        edges = sum((drawn - pixels).diff(dim=dim).abs().mean() for dim in (2, 3))
        real, made = model["critic"](pixels), model["critic"](Opposed.apply(drawn))
        critic = relu(1 - real).mean() + relu(1 + made).mean()
        loss = EDGE * edges + CRITIC * critic - DECIBEL * decibel
        return {"loss": loss, "decibel": decibel, "edges": edges, "critic": critic}

    fit("decoder", model, batch_of, loss_of, config, folder, device)
    return vae.requires_grad_(False)
