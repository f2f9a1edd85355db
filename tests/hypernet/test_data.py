"""The data of the loop: captions are encoded once, photos decoded once, draws named by their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_train import settings
from torch import Tensor

import eyes
from hyperdreambooth.base import denoise
from hyperdreambooth.base.denoise import LossConfig, denoise_loss, sample_noises
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_faces
from hyperdreambooth.faces.image import to_pixels
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
    examples = [Example(0, 0, tuple(rows), ("here",))]
    read: list[int] = []
    micro_base.pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    for part, times in (("unet", [2]), ("text_encoder", [2, 2, 2])):
        text = part == "text_encoder"
        faces = load_faces(people, micro_base, load_encoder(eye), "a [V] {class_word}", tmp_path, text)
        bare = fresh([site for site in micro_base.sites if site.component == part], 2)
        worn = {name: (down, torch.randn_like(up)) for name, (down, up) in bare.items()}
        with torch.no_grad(), wear(micro_base.components, worn):
            batch = collect(micro_base, faces, examples)
            ours = [person_losses(micro_base, batch, LossConfig()) for _ in range(2)]
            assert read == times
            captions = [faces.photos[row].caption or "" for row in rows]
            conditioning = micro_base.encode_prompts(micro_base.tokenize(captions))
            noise, timesteps = sample_noises(micro_base, tuple(batch.latents.shape[1:]), batch.keys)
            plain = denoise_loss(micro_base, batch.latents, conditioning, noise, timesteps).mean()
            read.pop()
        torch.testing.assert_close(torch.cat(ours), plain.expand(2))


def test_padding_of_target_photos_has_no_weight(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    people = read_faces(micro_photos)
    first, *rest = people["person-0"]
    corners = ((0.25, -1.0), (2.0, -1.0), (2.0, 2.0), (0.25, 2.0))
    people["person-0"] = (replace(first, corners=corners), *rest)
    faces = load_faces(people, micro_base, load_encoder(eye), "a [V] {class_word}", tmp_path, False)
    with torch.no_grad():
        batch = collect(micro_base, faces, [Example(0, 1, (0, 1), ("here",))])
        got = person_losses(micro_base, batch, LossConfig())
        noise, timesteps = sample_noises(micro_base, tuple(batch.latents.shape[1:]), batch.keys)
        losses = denoise_loss(micro_base, batch.latents, batch.conditioning(), noise, timesteps, batch.masks)
    assert batch.masks is not None and (batch.masks[0, 0, :, :2] == 0).all() and (batch.masks[1] == 1).all()
    torch.testing.assert_close(got, losses.mean()[None])


def test_draws_follow_the_place_and_the_reference_is_not_the_target() -> None:
    nothing: Any = None
    faces = Faces(("a", "b", "c"), (), (0, 3, 4, 6), nothing, nothing, nothing, (), nothing)
    for place in range(40):
        example = pick(faces, [0, 1, 2], 2, 5, "train", 9, place)
        assert example == pick(faces, [0, 1, 2], 2, 5, "train", 9, place)
        rows = faces.rows(example.identity)
        assert {example.reference, *example.targets} <= set(rows)
        assert len(rows) == 1 or example.reference not in example.targets
    drawn = [pick(faces, [0, 2], 1, 5, "train", 0, place).identity for place in range(400)]
    assert set(drawn) == {0, 2} and 150 < drawn.count(2) < 250


def test_each_photo_is_decoded_once_for_latents_and_features(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, encoder = read_faces(micro_photos), load_encoder(eye)
    photos = [photo for group in people.values() for photo in group]
    opened: list[Path] = []
    real = Photo.open

    def counted(photo: Photo) -> Image.Image:
        opened.append(photo.path)
        return real(photo)

    monkeypatch.setattr(Photo, "open", counted)
    for _ in range(2):  # the second time from the cache
        faces = load_faces(people, micro_base, encoder, "a [V] face", tmp_path, False)
        assert sorted(opened) == sorted(photo.path for photo in photos)
    pixels = torch.stack([to_pixels(real(photo), micro_base.resolution) for photo in photos])
    assert faces.features.dtype == torch.float16
    torch.testing.assert_close(faces.features, encoder(pixels).half())
    torch.testing.assert_close(faces.latents, micro_base.encode_images(pixels))


def test_another_encoder_finds_nothing_in_the_cache(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    people = {"person-0": read_faces(micro_photos)["person-0"]}
    other = eyes.resnet(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    made = [
        load_faces(people, micro_base, load_encoder(source), "a [V] face", cache, True).features
        for source in (eye, other)
    ]
    assert len(list(cache.iterdir())) == 2
    assert not torch.equal(made[0], made[1])


def test_at_most_a_quarter_is_held_out() -> None:
    trained, held = hold_out(10, 16, 0)
    assert len(held) == 2
    assert sorted(trained + held) == list(range(10))
    assert hold_out(3, 16, 0) == ([0, 1, 2], [])


def test_noisier_timesteps_are_trained_on_and_never_judged_by(
    micro_base: Base, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    biases: list[int] = []
    real = denoise._sampled

    def watched(base: Base, shape: tuple[int, ...], keys: Any, bias: int = 1) -> tuple[Tensor, Tensor]:
        biases.append(bias)
        return real(base, shape, keys, bias)

    monkeypatch.setattr(denoise, "_sampled", watched)
    train_hypernet(micro_base, micro_photos, tmp_path, settings(eye, steps=1, batch=4, timestep_bias=3))
    assert biases[0] == 3
    assert set(biases[1:]) == {1}
