"""Any vision model as an encoder: towers, maps and tokens, preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import eyes
from hyperdreambooth.base.load import EMBEDDED, EMBEDDED_NAME
from hyperdreambooth.faces.image import to_pixels
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.encoder import Preprocess, encoder_of, load_encoder
from hyperdreambooth.hypernet.predictor import EMBEDDED_HYPERNET, load_hypernet


def test_convolution_maps_become_tokens(tmp_path: Path) -> None:
    eye = load_encoder(eyes.resnet(tmp_path / "eye"))
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    features = eye(pixels)
    shown = eye.model(pixel_values=eye.preprocess(pixels)).last_hidden_state
    assert (eye.tokens, eye.channels) == tuple(features.shape[1:])
    assert eye.preprocess.size == 32
    torch.testing.assert_close(features[1, 1], shown[1, :, 0, 1])
    assert not any(p.requires_grad for p in eye.model.parameters())


def test_the_preprocessor_file_is_followed(tmp_path: Path) -> None:
    eye = load_encoder(eyes.vit(tmp_path / "eye"))
    assert eye.preprocess == Preprocess(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (eye.tokens, eye.channels) == (5, 8)
    white = eye.preprocess(torch.ones(1, 3, 40, 40))
    torch.testing.assert_close(white[0, :, 3, 3], torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]))


def test_of_clip_the_vision_tower_runs_and_the_crop_size_counts(tmp_path: Path) -> None:
    eye = load_encoder(eyes.clip(tmp_path / "eye"))
    assert (eye.preprocess.size, eye.tokens, eye.channels) == (16, 5, 8)


@pytest.mark.parametrize(
    ("make", "layers", "channels"), [(eyes.vit, (0, -1), 16), (eyes.resnet, (0, 1, 2), 32)]
)
def test_layers_lie_side_by_side(
    tmp_path: Path, make: object, layers: tuple[int, ...], channels: int
) -> None:
    folder = make(tmp_path / "eye")  # type: ignore[operator]
    eye, last = load_encoder(folder, layers), load_encoder(folder)
    pixels = torch.rand(1, 3, 32, 32)
    assert eye.channels == channels
    assert eye.fingerprint != last.fingerprint
    if make is eyes.resnet:  # of a ViT the last hidden state has one more norm behind it
        torch.testing.assert_close(eye(pixels)[..., -last.channels :], last(pixels))
    with pytest.raises(InputError, match="expected hidden states from 0 to"):
        load_encoder(folder, (9,))


@pytest.mark.parametrize("make", [eyes.resnet, eyes.vit, eyes.clip, eyes.dinov2, eyes.siglip])
def test_a_saved_encoder_is_the_same(tmp_path: Path, make: object) -> None:
    eye = load_encoder(make(tmp_path / "eye"))  # type: ignore[operator]
    eye.save(tmp_path / "copy")
    again = load_encoder(tmp_path / "copy")
    pixels = torch.rand(1, 3, 20, 20)
    assert again.fingerprint == eye.fingerprint
    assert torch.equal(again(pixels), eye(pixels))


@pytest.mark.parametrize("make", [eyes.vit, eyes.clip, eyes.dinov2, eyes.siglip])
def test_preprocessing_is_the_models_own(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Of a photo larger than the model's; the processors round to eight bits between their steps."""
    folder = make(tmp_path / "eye")
    kinds = {eyes.vit: ("ViTImageProcessor", 2), eyes.clip: ("CLIPImageProcessor", 3)}
    if make in kinds:
        kind, resample = kinds[make]
        size = {"shortest_edge": 16} if make is eyes.clip else {"height": 16, "width": 16}
        eyes.recipe(folder, kind, size, resample=resample)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((40, 40))
    theirs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt").pixel_values
    eye = load_encoder(folder)
    ours = eye.preprocess(to_pixels(image, 40)[None])
    assert eye.preprocess.bicubic == (make is not eyes.vit)
    torch.testing.assert_close(ours, theirs, atol=2.5 / 255 / 0.2, rtol=0)
    with torch.no_grad():
        seen = eye.tower(pixel_values=theirs).last_hidden_state
    torch.testing.assert_close(eye(to_pixels(image, 40)[None]), seen, atol=0.05, rtol=0)


def test_weights_that_are_not_read_do_not_name_the_encoder(tmp_path: Path) -> None:
    """The head of a ViT is new and random wherever the checkpoint has none."""
    folder = eyes.vit(tmp_path / "eye")
    assert load_encoder(folder).fingerprint == load_encoder(folder).fingerprint


def test_what_is_no_vision_model_is_one_line(tmp_path: Path, micro_dir: Path) -> None:
    for source in (tmp_path / "nothing", micro_dir / "text_encoder", "nobody/nothing"):
        with pytest.raises(InputError, match="encoder") as caught:
            load_encoder(source)
        assert "\n" not in str(caught.value)


def test_avatars_names_the_shipped_encoder() -> None:
    assert load_encoder("avatars").fingerprint == load_hypernet(EMBEDDED_HYPERNET).encoder.fingerprint


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (None, "avatars"), (EMBEDDED_NAME, "avatars"), (str(EMBEDDED), "avatars"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "facebook/dinov2-small"),
    ],
)  # fmt: skip
def test_the_default_encoder_is_the_shipped_one_on_the_avatars_base(base: str | None, name: str) -> None:
    assert encoder_of(base) == name


def test_dinov3_gives_patches_after_its_class_and_register_tokens(tmp_path: Path) -> None:
    eye = load_encoder(eyes.dinov3(tmp_path / "eye"))
    pixels = torch.rand(2, 3, 40, 40) * 2 - 1
    assert (eye.preprocess.size, eye.tokens, eye.channels) == (32, 1 + 2 + 4, 16)
    shown = eye.model(pixel_values=eye.preprocess(pixels)).last_hidden_state
    torch.testing.assert_close(eye(pixels), shown)
    assert eye.texture(pixels).shape[0] == 2 and len(eye.fingerprint) == 16
