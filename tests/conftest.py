"""Fixtures: a micro base and micro people, made once a session; and array types are checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: with a thread a core each, they wait for one another most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# tensor maths: what is imported from now on checks the shapes of every call
CHECKED = ("lidb.weights", "lora.inject", "lora.relax", "hypernet.decoder", "hypernet.loss")
install_import_hook([f"hyperdreambooth.{module}" for module in CHECKED], "beartype.beartype")

if TYPE_CHECKING:
    from hyperdreambooth.base.load import Base


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs share is shared by one session of tests, and by nobody's own work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def micro_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved micro StableDiffusionPipeline (32 px, 8×8×4 latents)."""
    import micro

    return micro.save(tmp_path_factory.mktemp("micro") / "base")


@pytest.fixture(scope="session")
def micro_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, three 32-pixel photos each, with captions."""
    import micro

    return micro.photos(tmp_path_factory.mktemp("people") / "photos")


@pytest.fixture
def micro_base(micro_dir: Path) -> Base:
    """The micro base, freshly loaded: a test may wear what it likes."""
    from hyperdreambooth.base.load import load_base

    return load_base(micro_dir, device="cpu")
