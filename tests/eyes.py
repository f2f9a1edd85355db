"""Tiny vision models as folders, and a bank of made-up people over a base's sites."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)

from hyperdreambooth.base.load import Base
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import Layout, start


def resnet(folder: Path, seed: int = 0) -> Path:
    """32 pixels → 4×4 tokens of 16 channels."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    config.image_size = 32
    ResNetModel(config).save_pretrained(folder)
    return folder


def dinov3(folder: Path) -> Path:
    """32 pixels → 4 patches behind a class token and two registers, of 16 channels."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=16, num_register_tokens=2,
    )  # fmt: skip
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """16 pixels → 4 tokens and a class token, of 8 channels; with a preprocessor file of its own."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    facts = {"size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def clip(folder: Path) -> Path:
    """Both towers; the recipe resizes to 20 and crops 16."""
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    text = CLIPTextConfig(
        **small, vocab_size=8, max_position_embeddings=4, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    CLIPModel(
        CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=8)
    ).save_pretrained(folder)
    facts = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def dinov2(folder: Path) -> Path:
    """16 pixels → 4 tokens and a class token, of 8 channels; bicubic."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=16, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    return recipe(folder, "BitImageProcessor", {"shortest_edge": 16}, resample=3, do_center_crop=True)


def siglip(folder: Path) -> Path:
    """Both towers; 16 pixels → 4 tokens of 8 channels; bicubic."""
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = SiglipVisionConfig(**small, image_size=16, patch_size=8)
    text = SiglipTextConfig(**small, vocab_size=8, max_position_embeddings=4)
    config = SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    SiglipModel(config).save_pretrained(folder)
    return recipe(folder, "SiglipImageProcessor", {"height": 16, "width": 16}, resample=3)


def recipe(folder: Path, kind: str, size: dict[str, int], **more: object) -> Path:
    """The preprocessor file of a real model of that kind, at 16 pixels."""
    facts = {
        "image_processor_type": kind, "size": size, "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_resize": True, "do_normalize": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, **more,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def bank(
    base: Base, folder: Path, names: tuple[str, ...], seed: int = 0, fingerprint: str | None = None
) -> Bank:
    """People a little way from the shared start, over small bases of seed 7."""
    layout = Layout(base.sites, 1, 6, 4)
    manifest = {
        "layout": layout.to_json(), "basis_source": "seed:7",
        "base_fingerprint": fingerprint or base.fingerprint,
    }  # fmt: skip
    made = Bank.create(folder, manifest, start(layout, 7))
    people = made.start + 0.3 * torch.randn(
        len(names), layout.size, generator=torch.Generator().manual_seed(seed)
    )
    made.append(names, people)
    return made
