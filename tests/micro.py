"""A micro Stable Diffusion pipeline and micro people: the real classes, random weights, fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from hyperdreambooth.base.load import Base
from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.hypernet.encoder import load_encoder
from hyperdreambooth.hypernet.predictor import HypernetInfo, Predictor
from hyperdreambooth.lidb.basis import seeded_basis
from hyperdreambooth.lidb.weights import Layout

WORDS = ("a", "photo", "of", "sks", "face", "smiling", "hat", "wearing")


def tokenizer() -> CLIPTokenizer:
    """Bytes plus a few whole words, so that every text can be tokenized and the trigger is one token."""
    vocab: dict[str, int] = {}
    for ending in ("", "</w>"):
        for byte in sorted(ByteLevel.alphabet()):
            vocab[byte + ending] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0] if len(word) > 1 else ""
        for index, letter in enumerate(word[1:], 1):
            right = letter + ("</w>" if index == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            vocab.setdefault(left, len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16, pad_token="<|endoftext|>")


def text_encoder(tok: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 16."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def vae() -> AutoencoderKL:
    """32 pixels → 8×8×4 latents."""
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        mid_block_add_attention=False,
    ).eval()


def unet() -> UNet2DConditionModel:
    """Two levels (16, 32), attention on the lower one and in the middle."""
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def pipeline() -> StableDiffusionPipeline:
    """The whole micro pipeline, the same weights on every call."""
    tok = tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(tok),
        tokenizer=tok,
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path) -> Path:
    """Saves the micro pipeline with its trigger, as a base folder."""
    pipeline().save_pretrained(folder)
    (folder / "hyperdreambooth.json").write_text(json.dumps({"trigger": "sks", "class_word": "face"}))
    return folder


def photos(folder: Path, identities: int = 6, each: int = 3) -> Path:
    """Ordinary photo folders: a colour blob a person, moved from photo to photo, with captions."""
    for person in range(identities):
        rng = np.random.default_rng(person)
        colours = rng.integers(0, 255, (2, 3))
        home = folder / f"person-{person}"
        home.mkdir(parents=True)
        for k in range(each):
            pixels = np.tile(colours[0], (32, 32, 1)).astype(np.uint8)
            pixels[8 + k : 24 + k, 8 - k : 24 - k] = colours[1]
            Image.fromarray(pixels).save(home / f"{k}.png")
            (home / f"{k}.txt").write_text("a photo of a [V] face" + (", smiling" if k else ""))
    return folder


def hypernet(folder: Path, base: Base) -> Path:
    """An untrained hypernetwork for the micro base whose predictions differ from person to person."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.image_size = 16
    ResNetModel(config).save_pretrained(folder / "eye")
    encoder = load_encoder(folder / "eye")
    features = encoder(torch.rand(4, 3, 32, 32) * 2 - 1)
    layout = Layout(base.sites, 1, 6, 4)
    shape = NetworkShape(features.shape[1], features.shape[2], width=8, layers=1, heads=2, refinements=2)
    network = HyperNetwork(layout, shape, seeded_basis(base.sites, 6, 4, 0))
    network.normalise(torch.randn(layout.size) * 0.3, torch.ones(layout.size), features)
    torch.nn.init.normal_(network.head)
    facts = HypernetInfo(base.fingerprint, base.source, "sks", "face", base.resolution)
    Predictor(network, encoder, facts).save(folder / "made")
    return folder / "made"


def scorer(folder: Path, labels: Sequence[str], seed: int, **facts: object) -> None:
    """A tiny random ResNet as a scorer, with what it says of itself."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: k for k, label in enumerate(labels)},
    )
    config.image_size = 16
    for name, value in facts.items():
        setattr(config, name, value)
    ResNetForImageClassification(config).save_pretrained(folder)


LABELS = ["hat:none", "hat:red", "hat:top", "mood:smiling", "mood:sad", "trait:age", "trait:nose"]
PHRASES = {
    "hat:none": "",
    "hat:red": "red hat",
    "hat:top": "red hat with a feather",
    "mood:smiling": "smiling",
    "mood:sad": "sad",
}


def scorers(folder: Path) -> None:
    """Both scorers of a base, random."""
    same = {"same": 0.9, "stranger": 0.2}
    scorer(folder / "identity", [f"embedding:{k}" for k in range(5)], 0, calibration=same)
    scorer(folder / "attributes", LABELS, 1, phrases=PHRASES)
