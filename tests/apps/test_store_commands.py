"""Commands whose bank lies in an object store do what they do with a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import SMALL, error, hdb, report
from hyperdreambooth.files import load_tensors
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.storage import Store


def test_a_bank_in_a_store(
    micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDB_CACHE", str(tmp_path / "cache"))
    url, folder = f"memory://{tmp_path.name}/bank", tmp_path / "bank"
    on = ["--base", micro_dir, "--device", "cpu"]
    for out in (url, folder):
        words = ["--steps", "2", "--set", "identities_per_batch=4", *SMALL]
        made = hdb("preoptimize", micro_photos, "--out", out, *on, *words)
        assert made.stdout.splitlines()[-1] == f"{out}: 6 people"
    store = Store(url)
    for part, count in (("shards", 2), ("index", 1)):
        files = {name: (store / part).read(name) for name in (store / part).names()}
        assert len(files) == count
        assert files == {path.name: path.read_bytes() for path in (folder / part).iterdir()}
    assert (store / "cache").local is None and report(store.here)["identities"] == 6
    assert not [*Path().glob("memory:*")]  # nothing took the URL for a path

    for source, out in ((url, tmp_path / "a"), (folder, tmp_path / "b")):
        hdb("export", source, "--identity", "person-3", "--format", "lidb", "--out", out, *on)
    made, other = (load_tensors(next((tmp_path / name).glob("*.safetensors"))) for name in "ab")
    assert made[0].keys() == other[0].keys() and made[1] == other[1]
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in made[0].items())
    with pytest.raises(Exception, match="expected a bank on a disk"):
        _ = Bank.open(url).folder


def test_a_bank_that_is_not_there(micro_photos: Path, tmp_path: Path) -> None:
    words = ["train", micro_photos, "--out", tmp_path / "net", "--bank"]
    assert "memory://nothing: expected a bank" in error(*words, "memory://nothing")
    assert "expected a folder or a URL" in error(*words, "nonsense://bank")
