"""Makes a micro base and micro people once per session, and has array types checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores. With a thread per core in each of them, they mostly wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Modules of tensor maths. The hook makes every call of their functions check its shapes.
CHECKED = ("lidb.weights", "lora.inject", "lora.relax", "hypernet.decoder", "hypernet.loss")
install_import_hook([f"hyperdreambooth.{module}" for module in CHECKED], "beartype.beartype")
# Before the hub's libraries, as in a user's process: it gives them a folder where the user has no home.
import_module("hyperdreambooth")

if TYPE_CHECKING:
    from hyperdreambooth.base.load import Base


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives the session a cache of its own, apart from the developer's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def micro_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a micro StableDiffusionPipeline (32 pixels, 8×8×4 latents) and returns its folder."""
    import micro

    return micro.save(tmp_path_factory.mktemp("micro") / "base")


@pytest.fixture(scope="session")
def micro_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes three 32-pixel photos with captions for each of six people."""
    import micro

    return micro.photos(tmp_path_factory.mktemp("people") / "photos")


@pytest.fixture
def micro_base(micro_dir: Path) -> Base:
    """Loads the micro base anew, so that a test can change it."""
    from hyperdreambooth.base.load import load_base

    return load_base(micro_dir, device="cpu")
