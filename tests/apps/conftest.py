"""What the commands make on the micro base, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from commands import SMALL, hdb, photo, with_network


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path, micro_photos: Path) -> Path:
    """A bank and a hypernetwork on the micro base, made by the commands."""
    home = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(shape).save_pretrained(home / "encoder")
    on = ["--base", micro_dir, "--device", "cpu", "--steps", 2]
    hdb("preoptimize", micro_photos, "--out", home / "bank", *on, *SMALL, "--set", "identities_per_batch=4")
    words = [f"encoder={home / 'encoder'}", "width=8", "heads=2", "batch=2", "validation=1", "draws=1"]
    sets = [*SMALL, *(part for word in words for part in ("--set", word))]
    hdb("train", micro_photos, "--out", home / "hypernet", "--bank", home / "bank", *on, *sets)
    hdb("predict", photo(micro_photos), "--out", home / "p.lidb.safetensors", *with_network(home, micro_dir))
    return home
