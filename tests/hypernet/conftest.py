"""What every training of a hypernetwork here has: a small vision model."""

from __future__ import annotations

from pathlib import Path

import pytest

import eyes


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eyes.resnet(tmp_path_factory.mktemp("eye"))
