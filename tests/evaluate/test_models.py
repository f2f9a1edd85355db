"""The scorers that are downloaded, against plain transformers and arithmetic on tiny random models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

import micro
from hyperdreambooth.base.load import Base
from hyperdreambooth.evaluate.models import Clip, Dino
from hyperdreambooth.evaluate.scorers import load_scorers, mean_cosine

CPU = torch.device("cpu")
SIZE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tok = tmp_path_factory.mktemp("clip"), micro.tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    text = {**small, **ids, "vocab_size": len(tok), "max_position_embeddings": 16}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tok.save_pretrained(folder)
    CLIPImageProcessor(**SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=16, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(**SIZE).save_pretrained(folder)
    return folder


def test_clip_gives_what_the_whole_model_gives(clip: Path) -> None:
    ours, model = Clip(str(clip), CPU), CLIPModel.from_pretrained(clip).eval()
    images, texts = pictures(20), ["a photo of a face", "a hat"]
    pixels = CLIPImageProcessor.from_pretrained(clip)(images, return_tensors="pt").pixel_values
    words = micro.tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model(pixel_values=pixels, **words)
    torch.testing.assert_close(ours.embed(images), whole.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.embed_texts(texts), whole.text_embeds, atol=1e-5, rtol=0)


def test_dino_is_the_class_token_and_likeness_the_mean_cosine(dino: Path) -> None:
    ours, model = Dino(str(dino), CPU), Dinov2Model.from_pretrained(dino).eval()
    images, others = pictures(3), pictures(2, seed=5)

    def alone(image: Image.Image) -> torch.Tensor:
        pixels = BitImageProcessor.from_pretrained(dino)([image], return_tensors="pt").pixel_values
        with torch.no_grad():
            return model(pixel_values=pixels).last_hidden_state[0, 0]

    for found, image in zip(mean_cosine(ours.embed, images, others), images, strict=True):
        cosines = [torch.cosine_similarity(alone(image), alone(other), dim=0).item() for other in others]
        assert found == pytest.approx(sum(cosines) / 2, abs=1e-5)


def test_what_cannot_be_had_is_one_line_and_null(micro_base: Base, clip: Path, tmp_path: Path) -> None:
    scorers = load_scorers(micro_base, str(clip), str(tmp_path / "nowhere"), "nobody/no-faces")
    assert scorers.clip is not None and scorers.dino is None and scorers.base is None
    scores = ("identity, leak, sim_target, sim_reference, copy_paste", "prompt, traits", "dino")
    places = ("nobody/no-faces", "scorers", "nowhere")
    assert len(scorers.missing) == 3
    for line, score, place in zip(scorers.missing, scores, places, strict=True):
        assert line.startswith(f"{score}: null") and place in line and "\n" not in line
    assert scorers.names.keys() == {"base", "clip", "dino", "face"}
    assert [name for name, value in scorers.names.items() if value is not None] == ["clip"]
    images, reference = pictures(3), pictures(1, seed=9)[0]
    prompts = ["a photo of a [V] face", "[V], a hat", "a face"]
    found = scorers(images, prompts, reference, pictures(2, seed=3))
    assert found.keys() == {"pose_copied", "background_copied", "diversity", "clip_i", "clip_t"}
    assert all(len(values) == 3 for values in found.values())
    plain = Clip(str(clip), CPU).embed_texts(["a photo of a face", ", a hat", "a face"])
    expected = (Clip(str(clip), CPU).embed(images) * plain).sum(1).tolist()
    assert found["clip_t"] == pytest.approx(expected, abs=1e-5)
    assert "clip_i" not in scorers(images, [None] * 3, reference, [])


def test_other_weights_in_the_same_folder_are_another_scorer(
    micro_base: Base, clip: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(clip, tmp_path / "clip")

    def name() -> str | None:
        return load_scorers(micro_base, str(place), None, None).names["clip"]

    first = name()
    assert first == name() and first is not None
    (place / "README.md").write_text("nothing that a scorer reads")
    assert name() == first
    model = CLIPModel.from_pretrained(place)
    model.text_projection.weight.data[-1, -1] += 1  # the very last number
    model.save_pretrained(place)
    assert name() not in (None, first)


def test_a_cut_dino_is_one_line_and_null(micro_base: Base, dino: Path, tmp_path: Path) -> None:
    place = shutil.copytree(dino, tmp_path / "dino")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    scorers = load_scorers(micro_base, None, str(place), None)
    assert scorers.dino is None and scorers.missing[-1].startswith("dino: null")
