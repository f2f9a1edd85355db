"""The last stage of the avatars' base: its decoder learns to mend what the base has drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from hyperdreambooth.avatars.build.autoencoder import CROP, DECIBEL, cut, latents_of
from hyperdreambooth.avatars.build.diffusion import scheduler, training_caption
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.files import load_tensors, save_tensors
from hyperdreambooth.precision import autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import rng

EDGE, CRITIC = 0.1, 0.02  # weights of the losses besides the signal-to-noise ratio
NOISE = 0.2  # at most, in latents of mean square 1
REDRAWN, PART = 3000, 100  # pictures that the base draws, and how many of them together
STEPS, GUIDANCE = 25, (1.5, 2.5, 4.0)
FIRST = range(11, 23)  # the steps that they begin with, at timesteps 559 to 119


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


@torch.no_grad()
def redrawn(pipe: Any, pictures: Pictures, latents: Tensor, config: StageConfig, file: Path) -> Tensors:
    """Returns pictures with the mistakes that the base makes: it draws them, but not from the beginning.

    Each is noised up to a timestep, and drawn from there on by its caption, with more or less guidance.

    Args:
        pipe: with the trained base, on its device.
        pictures: `m` of them.
        latents: theirs, `(m, c, h, w)`.
        config: its seed draws pictures, timesteps and noises.
        file: holds the answer from then on.

    Returns:
        `rows` of the pictures `(n,)`, and `latents` as they were drawn `(n, c, h, w)`, float16.
    """
    if file.is_file():
        return load_tensors(file)[0]
    rows = torch.randperm(len(pictures), generator=rng("redrawn", config.seed))[:REDRAWN]
    drawn: list[Tensor] = []
    parts = rows.split(PART)
    with Progress("redraw", len(parts)) as bar:
        for k, part in enumerate(parts):
            first, guidance = FIRST[k % len(FIRST)], GUIDANCE[k % len(GUIDANCE)]
            texts = [training_caption(pictures, row, config.seed, k) for row in part.tolist()]
            noise = torch.randn(len(part), *latents.shape[1:], generator=rng("redrawn", config.seed, k))
            with autocast(config.precision, pipe.device):
                drawn.append(_drawn(pipe, texts, latents[part].float(), noise, first, guidance))
            bar.update(1)
    made = {"rows": rows, "latents": torch.cat(drawn)}
    save_tensors(file, made)
    return made


def _drawn(pipe: Any, texts: list[str], clean: Tensor, noise: Tensor, first: int, guidance: float) -> Tensor:
    """Returns latents `(b, c, h, w)` that were noised and then drawn from step number `first` on, float16."""
    device, sampler = pipe.device, scheduler()
    sampler.set_timesteps(STEPS, device=device)
    timesteps = sampler.timesteps[first:]
    sampler.set_begin_index(first)
    latents = sampler.add_noise(clean.to(device), noise.to(device), timesteps[:1].expand(len(clean)))
    both = [""] * len(texts) + texts
    tokens = pipe.tokenizer(both, padding="max_length", truncation=True, return_tensors="pt")
    hidden = pipe.text_encoder(tokens.input_ids.to(device))[0]
    for timestep in timesteps:
        pair = torch.cat([latents, latents])
        answer = pipe.unet(pair, timestep, encoder_hidden_states=hidden, return_dict=False)[0]
        bare, named = answer.float().chunk(2)
        latents = sampler.step(bare + guidance * (named - bare), timestep, latents, return_dict=False)[0]
    return latents.half().cpu()


def train_decoder(pipe: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str) -> None:
    """Trains the decoder of a trained base alone, so that latents stay what they are.

    Half of the latents are of rendered pictures, with a little noise; the others the base has drawn, and the
    decoder learns to mend its mistakes. A critic learns to tell crops from what the decoder makes of them,
    and the decoder to deceive it (hinge loss on parts of pictures, arXiv 2012.09841, section 3.1). One
    backward pass serves both.
    """
    vae = pipe.vae
    latents = latents_of(vae, pictures, folder / "latents.safetensors", device)
    drawn = redrawn(pipe, pictures, latents, config, folder / "redrawn.safetensors")
    parts = {
        "decoder": vae.decoder,
        "post_quant_conv": vae.post_quant_conv,
        "critic": new_critic(config.seed),
    }
    model = nn.ModuleDict(parts).float().requires_grad_(True).to(device)
    side, scale = CROP // 8, pictures.pixels[0].shape[1] // latents.shape[-1]

    def batch_of(step: int) -> Tensors:
        generator, count = rng("decoder", config.seed, step), config.batch

        def chosen(below: int, *shape: int) -> Tensor:
            return torch.randint(0, below, shape, generator=generator)

        own, theirs = chosen(len(pictures), count), chosen(len(drawn["rows"]), count)
        corners = chosen(latents.shape[-1] - side + 1, 2 * count, 2)
        off = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
        seen = latents[own].float()
        noisy = seen + off * torch.randn(seen.shape, generator=generator)
        pixels = pictures.batch(torch.cat([own, drawn["rows"][theirs]]))
        both = torch.cat([noisy, drawn["latents"][theirs].float()])
        return {"latents": cut(both, corners, side), "pixels": cut(pixels, corners * scale, CROP)}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        made = model["decoder"](model["post_quant_conv"](batch["latents"])).float()
        squared = (made - pixels).square().mean(dim=(1, 2, 3))
        decibel = (10 * torch.log10(4 / squared)).mean()
        edges = torch.stack([(made - pixels).diff(dim=dim).abs().mean() for dim in (2, 3)]).sum()
        real, fake = model["critic"](pixels), model["critic"](Opposed.apply(made))
        critic = relu(1 - real).mean() + relu(1 + fake).mean()
        loss = EDGE * edges + CRITIC * critic - DECIBEL * decibel
        return {"loss": loss, "decibel": decibel, "edges": edges, "critic": critic}

    fit("decoder", model, batch_of, loss_of, config, folder, device)
    vae.requires_grad_(False)
