"""The last stage of the avatars' base: its decoder learns to mend what the base has drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hyperdreambooth.avatars.build.autoencoder import DECIBEL, latents_of
from hyperdreambooth.avatars.build.diffusion import scheduler, training_caption
from hyperdreambooth.avatars.build.fit import StageConfig, Tensors, fit
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.files import load_tensors, save_tensors
from hyperdreambooth.precision import autocast
from hyperdreambooth.progress import Progress
from hyperdreambooth.runs import rng

EDGE, LOOK = 0.1, 0.2  # weights of the losses besides the signal-to-noise ratio
MAPS = 4  # of the encoder, from the finest on, that say how a picture looks
NOISE = 0.2  # at most, in latents of mean square 1
REDRAWN, PART = 3000, 100  # pictures that the base draws, and how many of them together
STEPS, GUIDANCE = 25, (1.5, 2.5, 4.0)
FIRST = range(11, 23)  # the steps that they begin with, at timesteps 559 to 119


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


# Zhang et al., arXiv 1801.03924, equation 1, with all channels alike
def perceptual(encoder: Any, one: Tensor, other: Tensor) -> Tensor:
    """Returns how differently pictures `(b, 3, h, w)` look to an encoder, 0 to `4 * MAPS`."""
    seen = [encoder(pixels, output_hidden_states=True).hidden_states[:MAPS] for pixels in (one, other)]
    unit = [[normalize(of.float(), dim=1) for of in maps] for maps in seen]
    off = [(a - b).square().sum(dim=1).mean() for a, b in zip(*unit, strict=True)]
    return torch.stack(off).sum()


def train_decoder(
    pipe: Any, encoder: Any, pictures: Pictures, config: StageConfig, folder: Path, device: str
) -> None:
    """Trains the decoder of a trained base alone, so that latents stay what they are.

    Half of the latents are of rendered pictures, with a little noise; the others the base has drawn, and the
    decoder learns to mend its mistakes. It sees whole pictures: what a drawn eye should look like, the other
    eye may tell. Pixels alone would make it blur what it cannot know, so an encoder's maps count too.

    Args:
        pipe: the base.
        encoder: a frozen ResNet; it judges no picture.
        pictures, config, folder, device: as in `fit`.
    """
    vae = pipe.vae
    latents = latents_of(vae, pictures, folder / "latents.safetensors", device)
    drawn = redrawn(pipe, pictures, latents, config, folder / "redrawn.safetensors")
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    model = nn.ModuleDict(parts).float().requires_grad_(True).to(device)

    def batch_of(step: int) -> Tensors:
        generator, count = rng("decoder", config.seed, step), config.batch // 2
        own = torch.randint(0, len(pictures), (count,), generator=generator)
        theirs = torch.randint(0, len(drawn["rows"]), (count,), generator=generator)
        seen = latents[own].float()
        off = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
        noisy = seen + off * torch.randn(seen.shape, generator=generator)
        pixels = pictures.batch(torch.cat([own, drawn["rows"][theirs]]))
        return {"latents": torch.cat([noisy, drawn["latents"][theirs].float()]), "pixels": pixels}

    def loss_of(batch: Tensors) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        made = model["decoder"](model["post_quant_conv"](batch["latents"])).float()
        decibels = 10 * torch.log10(4 / (made - pixels).square().mean(dim=(1, 2, 3)))
        rendered, mended = (half.mean() for half in decibels.chunk(2))
        edges = torch.stack([(made - pixels).diff(dim=dim).abs().mean() for dim in (2, 3)]).sum()
        look = perceptual(encoder, made, pixels)
        loss = EDGE * edges + LOOK * look - DECIBEL * (rendered + mended) / 2
        return {"loss": loss, "rendered": rendered, "mended": mended, "edges": edges, "look": look}

    fit("decoder", model, batch_of, loss_of, config, folder, device)
    vae.requires_grad_(False)
