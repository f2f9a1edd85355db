"""A micro world for experiments: base, scorers, hypernetwork."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import micro
from hyperdreambooth.base.load import load_base


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path) -> Path:
    """A micro base with scorers, and a hypernetwork for it."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(micro_dir, folder / "base")
    micro.scorers(folder / "base" / "scorers")
    micro.hypernet(folder, load_base(folder / "base", device="cpu"))
    return folder
