"""A cache in an object store: encoded once for all machines, and read from this one's disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperdreambooth import cache
from hyperdreambooth.cache import cached_rows
from hyperdreambooth.storage import Store

NAMES = [f"{k:04x}" for k in range(20)]


def encoder(seen: list[int]) -> Callable[[list[int]], dict[str, Tensor]]:
    def encode(places: list[int]) -> dict[str, Tensor]:
        seen.extend(places)
        return {"latents": torch.tensor(places, dtype=torch.bfloat16)[:, None].expand(-1, 3)}

    return encode


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(cache, "BATCHES", 2)
    return Store(f"memory://{tmp_path.name}/cache") / "latents"


def test_another_machine_encodes_nothing(store: Store, tmp_path: Path) -> None:
    seen: list[int] = []
    wanted = torch.arange(20, dtype=torch.bfloat16)[:, None].expand(-1, 3)
    first = cached_rows(NAMES, encoder(seen), store, batch=3)["latents"]
    assert torch.equal(first, wanted) and sorted(seen) == list(range(20))
    assert len(store.names()) == 1  # the shards that were merged are gone, there as here
    assert [path.name for path in store.here.iterdir()] == store.names()

    shutil.rmtree(tmp_path / "here")  # another machine, and then the same again
    for _ in range(2):
        assert torch.equal(cached_rows(NAMES, encoder(seen), store, batch=3)["latents"], wanted)
    assert len(seen) == 20
    some = cached_rows(NAMES[5:9], encoder(seen), store)["latents"]
    assert torch.equal(some, wanted[5:9]) and len(seen) == 20


def test_what_a_killed_machine_uploaded_is_used(store: Store, tmp_path: Path) -> None:
    seen: list[int] = []
    encode = encoder(seen)

    def dies(places: list[int]) -> dict[str, Tensor]:
        if places[0] >= 9:
            raise KeyboardInterrupt
        return encode(places)

    with pytest.raises(KeyboardInterrupt):
        cached_rows(NAMES, dies, store, batch=3)
    assert len(store.names()) == 2 and sorted(seen) == list(range(9))
    shutil.rmtree(tmp_path / "here")
    cached_rows(NAMES, encode, store, batch=3)
    assert sorted(seen) == list(range(20)) and len(store.names()) == 1
