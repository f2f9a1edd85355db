"""A micro base with scorers and a hypernetwork, once a session, and what makes people on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from studios import maker_of

import micro
from hyperdreambooth.base.load import load_base
from hyperdreambooth.ui.making import Maker


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path) -> Path:
    """A micro base with scorers in `base`, and a hypernetwork for it in `made`."""
    home = tmp_path_factory.mktemp("ui")
    shutil.copytree(micro_dir, home / "base")
    micro.scorers(home / "base" / "scorers")
    micro.hypernet(home, load_base(home / "base", device="cpu"))
    return home


@pytest.fixture(scope="session")
def maker(world: Path) -> Maker:
    return maker_of(load_base(world / "base", device="cpu"), world / "made")
