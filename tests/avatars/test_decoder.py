"""The decoder's own stage: latents stay what they are, and decoder and critic work against one another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hyperdreambooth.avatars.build.autoencoder import new_vae
from hyperdreambooth.avatars.build.decoder import Opposed, train_decoder
from hyperdreambooth.avatars.build.fit import StageConfig
from hyperdreambooth.avatars.build.pictures import Pictures
from hyperdreambooth.avatars.draw.people import context


def test_only_the_decoder_changes(tmp_path: Path) -> None:
    vae = new_vae(0).eval().requires_grad_(False)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
    pictures = Pictures([pixels], [], [context(seed) for seed in range(4)], each=1)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    seen = pictures.batch(torch.arange(4))
    latents = vae.encode(seen).latent_dist.mode()
    train_decoder(vae, pictures, StageConfig(steps=2, batch=2, precision="float32"), tmp_path, "cpu")
    torch.testing.assert_close(vae.encode(seen).latent_dist.mode(), latents, rtol=0, atol=0)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}


def test_who_made_a_picture_wants_the_opposite_of_the_critic() -> None:
    made, critic = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    (Opposed.apply(made) * critic).sum().backward()
    torch.testing.assert_close(made.grad, -critic.detach())
    torch.testing.assert_close(critic.grad, made.detach())
