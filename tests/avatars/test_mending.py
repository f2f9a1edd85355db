"""The decoder's own stage: latents stay what they are."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hyperdreambooth.avatars.build.autoencoder import new_vae
from hyperdreambooth.avatars.build.decoder import perceptual, redrawn, train_decoder
from hyperdreambooth.avatars.build.diffusion import assemble, scheduler
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.build.readers import new_reader
from hyperdreambooth.avatars.draw.people import context, identity
from hyperdreambooth.runs import rng


def drawn(count: int) -> Pictures:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
    return Pictures([pixels], [identity(k) for k in range(count)], [context(k) for k in range(count)], each=1)


def test_only_the_decoder_changes(tmp_path: Path) -> None:
    pipe = assemble(new_vae(0).eval().requires_grad_(False), 0)
    before = {part: deepcopy(getattr(pipe, part).state_dict()) for part in ("vae", "unet", "text_encoder")}
    encoder = new_reader(["unused"], 0).resnet.requires_grad_(False).eval()
    train_decoder(
        pipe, encoder, drawn(4), StageConfig(steps=2, batch=2, precision="float32"), tmp_path, "cpu"
    )
    changed = {
        f"{part}.{name}"
        for part, tensors in before.items()
        for name, value in getattr(pipe, part).state_dict().items()
        if not torch.equal(value, tensors[name])
    }
    assert changed
    assert {".".join(name.split(".")[:2]) for name in changed} == {"vae.decoder", "vae.post_quant_conv"}


def test_a_base_without_mistakes_draws_the_same_pictures(tmp_path: Path) -> None:
    pictures, config = drawn(6), StageConfig(steps=1, precision="float32")
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(6, generator=rng("redrawn", config.seed))
    pipe, alphas = assemble(new_vae(0, 4), 0), scheduler().alphas_cumprod

    def perfect(noisy: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        clean, square = latents[rows].repeat(2, 1, 1, 1), alphas[timestep]
        return ((square.sqrt() * noisy - clean) / (1 - square).sqrt(),)  # v

    pipe.unet.forward = perfect
    file = tmp_path / "redrawn.safetensors"
    made = redrawn(pipe, pictures, latents, config, file)
    torch.testing.assert_close(made["rows"], rows)
    torch.testing.assert_close(made["latents"].float(), latents[rows], rtol=0, atol=5e-3)
    again = redrawn(pipe, pictures, torch.zeros_like(latents), config, file)  # from the file
    torch.testing.assert_close(again, made)


def test_pictures_look_alike_only_if_they_are() -> None:
    encoder = new_reader(["unused"], 0).resnet.requires_grad_(False).eval()
    pixels = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = pixels.flip(3).requires_grad_(True)
    apart = perceptual(encoder, made, pixels)
    apart.backward()
    assert float(perceptual(encoder, pixels, pixels)) == 0 < apart.item() and made.grad is not None
    assert bool(made.grad.isfinite().all())
