"""Who and what the loop is fed: captions read once, draws named by their slot, a quarter held out at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_train import settings
from torch import Tensor

from hyperdreambooth.base.denoise import denoise_loss, sample_noise
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import read_faces
from hyperdreambooth.hypernet import data
from hyperdreambooth.hypernet.data import Example, Faces, collect, hold_out, load_faces, person_losses, pick
from hyperdreambooth.hypernet.encoder import load_encoder
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import fresh


def test_captions_of_a_bare_text_encoder_are_read_once_and_the_loss_is_the_same(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    people = read_faces(micro_photos)
    rows = [0, 1, 4, 5]
    slots = [Example(0, 0, tuple(rows), ("here",))]
    read: list[int] = []
    micro_base.pipe.text_encoder.register_forward_pre_hook(
        lambda _, words, told: read.append(len(words[0] if words else told["input_ids"])), with_kwargs=True
    )
    for part, times in (("unet", [2]), ("text_encoder", [2, 4, 4])):
        text = part == "text_encoder"
        faces = load_faces(people, micro_base, load_encoder(eye), "a [V] {class_word}", tmp_path, text)
        bare = fresh([site for site in micro_base.sites if site.component == part], 2)
        worn = {name: (down, torch.randn_like(up)) for name, (down, up) in bare.items()}
        with torch.no_grad(), wear(micro_base.components, worn):
            batch = collect(micro_base, faces, slots)
            ours = [person_losses(micro_base, batch) for _ in range(2)]
            assert read == times
            said = [faces.photos[row].caption or "" for row in rows]
            told = micro_base.encode_prompts(micro_base.tokenize(said))
            plain = denoise_loss(micro_base, batch.latents, told, batch.noise, batch.timesteps).mean()
            read.pop()
        torch.testing.assert_close(torch.cat(ours), plain.expand(2))


def test_draws_follow_the_slot_and_the_reference_is_not_the_target() -> None:
    nothing: Any = None
    faces = Faces(("a", "b", "c"), (), (0, 3, 4, 6), nothing, nothing, (), nothing)
    for place in range(40):
        slot = pick(faces, [[0, 1, 2]], 0.0, 2, 5, "train", 9, place)
        assert slot == pick(faces, [[0, 1, 2]], 0.0, 2, 5, "train", 9, place)
        rows = faces.rows(slot.identity)
        assert {slot.reference, *slot.targets} <= set(rows)
        assert len(rows) == 1 or slot.reference not in slot.targets
    second = sum(
        pick(faces, [[0, 1], [2]], 0.25, 1, 5, "train", 0, place).identity == 2 for place in range(400)
    )
    assert 70 < second < 130


def test_at_most_a_quarter_is_held_out() -> None:
    trained, held = hold_out(10, 16, 0)
    assert len(held) == 2
    assert sorted(trained + held) == list(range(10))
    assert hold_out(3, 16, 0) == ([0, 1, 2], [])


def test_noisier_timesteps_are_trained_on_and_never_judged_by(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    biases: list[float] = []

    def watched(base: Base, shape: tuple[int, ...], *key: int | str, **how: Any) -> tuple[Tensor, Tensor]:
        biases.append(how["bias"])
        return sample_noise(base, shape, *key, **how)

    monkeypatch.setattr(data, "sample_noise", watched)
    train_hypernet(micro_base, micro_photos, tmp_path, settings(eye, steps=1, batch=4, timestep_bias=3))
    assert biases[:4] == [3] * 4
    assert set(biases[4:]) == {1}
