"""What every training of a hypernetwork here has: a small vision model, and no progress bars."""

from __future__ import annotations

from pathlib import Path

import pytest

import eyes


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eyes.resnet(tmp_path_factory.mktemp("eye"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDB_QUIET", "1")
