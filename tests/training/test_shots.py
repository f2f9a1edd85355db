"""What a training is shown: photos under their masks, captions, and class images drawn once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hyperdreambooth.base.conditioning import Conditioner
from hyperdreambooth.base.denoise import add_noise, denoise_loss, draw_of, sample_noise, target
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.faces.landmarks import TEMPLATE, face_oval
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.dreambooth import dreambooth
from hyperdreambooth.training import class_images
from hyperdreambooth.training.class_images import class_shots
from hyperdreambooth.training.config import TrainConfig
from hyperdreambooth.training.samples import Samples
from hyperdreambooth.training.shots import photo_shots
from steps import losses_of


@pytest.fixture
def person(micro_photos: Path) -> tuple[Photo, ...]:
    return read_person([micro_photos / "person-0"])


def test_the_oval_covers_the_head_and_not_the_corners() -> None:
    oval = face_oval(16, 16)
    assert oval.shape == (16, 16)
    assert float(oval[5:9, 6:10].min()) == 1
    assert max(float(oval[y, x]) for y in (0, -1) for x in (0, -1)) == 0
    torch.testing.assert_close(oval, oval.flip(1))


def test_the_mask_follows_the_landmarks(micro_base: Base, person: tuple[Photo, ...], tmp_path: Path) -> None:
    """A face left of the middle of a wide photo: the mask is the oval where its square has the face."""
    with Image.open(person[0].path) as image:
        image.resize((96, 64)).save(tmp_path / "wide.png")
    points = tuple((16 + 64 * x - 12, 64 * y) for x, y in TEMPLATE)  # 12 of 64 pixels to the left
    photos = (Photo(tmp_path / "wide.png", "ana", None, points), person[1])
    shots = photo_shots(micro_base, photos, "a [V]", background=0.25)
    moved = tuple((x - 12 / 64, y) for x, y in TEMPLATE)
    assert shots.masks is not None
    torch.testing.assert_close(shots.masks[0, 0], 0.25 + 0.75 * face_oval(8, 8, moved))
    torch.testing.assert_close(shots.masks[1, 0], 0.25 + 0.75 * face_oval(8, 8))
    assert not torch.equal(shots.masks[0], shots.masks[1])
    config = TrainConfig(batch=2, background=0.25)
    with torch.no_grad():
        encode = Conditioner(micro_base, shots.captions, text_worn=False)
        (got,) = losses_of(micro_base, Samples([[shots]], config), encode, config, 0)
        drawn = [
            sample_noise(micro_base, tuple(shots.latents.shape[1:]), 0, shots.person, 0, k) for k in (0, 1)
        ]
        alone = torch.zeros(())
        for k, (noise, at) in enumerate(drawn):
            one = (encode([shots.captions[k]]), noise[None], at[None], shots.masks[[k]])
            alone += denoise_loss(micro_base, shots.latents[[k]], *one)[0] / 2
    torch.testing.assert_close(got, alone)
    bad = (Photo(tmp_path / "wide.png", "ana", None, (points[1], points[0], *points[2:])),)
    with pytest.raises(InputError, match=r"wide\.png: the landmarks make no face"):
        photo_shots(micro_base, bad, "a [V]")


def test_padding_has_no_weight(micro_base: Base, person: tuple[Photo, ...]) -> None:
    """Whatever the padding shows, the loss is that of the photo alone; with and without the head's oval."""
    padded = replace(person[0], corners=((0.25, -1.0), (2.0, -1.0), (2.0, 2.0), (0.25, 2.0)))
    shots = photo_shots(micro_base, (padded, person[1]), "a [V]")
    assert shots.masks is not None
    assert (shots.masks[0, 0, :, :2] == 0).all() and (shots.masks[0, 0, :, 3:] == 1).all()
    assert (shots.masks[1] == 1).all()
    with torch.no_grad():
        noise, at = sample_noise(micro_base, tuple(shots.latents.shape[1:]), 0, "key")
        hidden = micro_base.encode_prompts(micro_base.tokenize(["a face"]))
        draw = draw_of(micro_base, noise[None], at[None])
        predicted = micro_base.predict(add_noise(shots.latents[:1], draw), at[None], hidden)
        error = (predicted - target(micro_base, shots.latents[:1], draw)).square()
        wanted = (error[0] * shots.masks[0]).sum() / (shots.masks[0].sum() * error.shape[1])
        got = denoise_loss(micro_base, shots.latents[:1], hidden, noise[None], at[None], shots.masks[:1])
    torch.testing.assert_close(got[0], wanted)
    with_oval = photo_shots(micro_base, (padded, person[1]), "a [V]", background=0.25)
    oval = photo_shots(micro_base, (person[0], person[1]), "a [V]", background=0.25)
    assert with_oval.masks is not None and oval.masks is not None
    torch.testing.assert_close(with_oval.masks, oval.masks * shots.masks)
    assert photo_shots(micro_base, person, "a [V]").masks is None


@pytest.mark.parametrize("text_worn", [False, True])
def test_conditioner_encodes_each_caption_as_alone(micro_base: Base, text_worn: bool) -> None:
    captions = ["a sks face", "a hat", "a sks face", "a photo"]
    with torch.no_grad():
        got = Conditioner(micro_base, captions, text_worn)(captions)["hidden"]
        alone = torch.cat([micro_base.encode_prompts(micro_base.tokenize([c]))["hidden"] for c in captions])
    torch.testing.assert_close(got, alone)


def test_captions_are_the_photos_own_or_the_configs(micro_base: Base, person: tuple[Photo, ...]) -> None:
    bare = Photo(person[0].path, person[0].identity, None)
    shots = photo_shots(micro_base, (bare, person[1]), "a photo of a [V] {class_word}")
    assert shots.captions == ("a photo of a sks face", "a photo of a sks face, smiling")


def prior(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"prior_weight": 0.5, "prior_images": 3, "prior_prompt": "a {class_word}", **fields})


def test_class_images_are_drawn_once_and_completed(
    micro_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path))
    calls: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def draw(_: Base, prompts: Sequence[str], *, seed: Sequence[int]) -> list[Image.Image]:
        calls.append((tuple(prompts), tuple(seed)))
        return [Image.new("RGB", (32, 32), (number % 256, 0, 0)) for number in seed]

    monkeypatch.setattr(class_images, "generate_images", draw)
    config = prior(prior_images=10, seed=3)
    (first,) = class_shots(micro_base, config)
    assert [len(prompts) for prompts, _ in calls] == [8, 2]
    assert calls[0][0][0] == "a face"
    assert len({seed for _, seeds in calls for seed in seeds}) == 10
    next(tmp_path.glob("class/*/00004.png")).unlink()
    seeds, calls[:] = calls[0][1], []
    (second,) = class_shots(micro_base, config)
    assert calls == [(("a face",), (seeds[4],))]
    torch.testing.assert_close(first.latents, second.latents)
    assert second.weight == 0.5


def test_class_images_of_another_decoder_or_scheduler_and_torn_ones_are_drawn_again(
    micro_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path))
    drawn: list[int] = []

    def draw(_: Base, prompts: Sequence[str], *, seed: Sequence[int]) -> list[Image.Image]:
        drawn.append(len(prompts))
        return [Image.new("RGB", (32, 32)) for _ in seed]

    def ask() -> int:
        drawn.clear()
        class_shots(micro_base, prior())
        return sum(drawn)

    monkeypatch.setattr(class_images, "generate_images", draw)
    assert (ask(), ask()) == (3, 0)
    next(tmp_path.glob("class/*/00001.png")).write_bytes(b"half")
    assert (ask(), ask()) == (1, 0)
    with torch.no_grad():
        next(micro_base.pipe.vae.parameters()).add_(1.0)
    assert (ask(), ask()) == (3, 0)
    micro_base.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert (ask(), ask()) == (3, 0)


def test_prior_preservation_trains_and_draws_class_images_once_for_all_runs(
    micro_base: Base, person: tuple[Photo, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "shared"))
    config = DreamboothConfig(steps=2, prior_weight=1.0, prior_images=3, down_dim=4, up_dim=4)
    trained = dreambooth(micro_base, person, tmp_path / "run", config)
    assert len(list((tmp_path / "shared").glob("class/*/*.png"))) == 3

    def refuse(*_: object, **__: object) -> list[Image.Image]:
        raise AssertionError("class images were drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(class_images, "generate_images", refuse)
        dreambooth(micro_base, person[:1], tmp_path / "other", config)  # another run draws none
        with pytest.raises(AssertionError, match="drawn again"):  # another prompt is another set
            asked = config.model_copy(update={"prior_prompt": "a drawing of a {class_word}"})
            dreambooth(micro_base, person, tmp_path / "asked", asked)
    more = config.model_copy(update={"prior_images": 5})
    dreambooth(micro_base, person[:1], tmp_path / "more", more)
    assert len(list((tmp_path / "shared").glob("class/*/*.png"))) == 5
    without = dreambooth(
        micro_base, person, tmp_path / "bare", config.model_copy(update={"prior_weight": 0.0})
    )
    assert any(
        not torch.equal(trained.factors[name][1], without.factors[name][1]) for name in trained.factors
    )
