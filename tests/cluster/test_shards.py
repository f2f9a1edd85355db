"""A bank made in parts by separate processes is that of one process, or a line says what is missing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from commands import SMALL, error, hdb
from hyperdreambooth.cluster.shards import Shard, check_shards
from hyperdreambooth.files import InputError
from hyperdreambooth.training import loop


def bank_files(folder: Path) -> dict[str, bytes]:
    """Everything of a bank that must not depend on who made it."""
    files = [folder / "index.json", folder / "manifest.json", *folder.glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}


def test_shards_in_any_order_two_of_them_killed_are_the_same_bank(
    micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[object] = ["preoptimize", micro_photos, "--base", micro_dir, "--device", "cpu", *SMALL]
    words += ["--steps", 3, "--set", "identities_per_batch=1", "--set", "save_every=1", "--out"]
    hdb(*words, tmp_path / "alone")
    assert "no shard has finished here" in error(*words, tmp_path / "parts", "--shard", "merge")
    order = [*range(4)]
    random.Random(1).shuffle(order)
    killed = order[1:3]
    for number in order:
        with monkeypatch.context() as patch:
            if number in killed:
                patch.setattr(loop, "step_losses", dies_in_its_second_step())
            shard = f"{number}/4"
            hdb(*words, tmp_path / "parts", "--shard", shard, code=130 if number in killed else 0)
    assert not (tmp_path / "parts" / "index.json").exists()  # nobody enters the bank before the merge
    line = error(*words, tmp_path / "parts", "--shard", "merge")
    assert all(f"{number}/4" in line for number in killed) and "not finished" in line
    for number in killed:
        hdb(*words, tmp_path / "parts", "--shard", f"{number}/4")
    monkeypatch.setattr(loop, "step_losses", None)  # a merge trains nobody
    hdb(*words, tmp_path / "parts", "--shard", "merge")
    assert bank_files(tmp_path / "alone") == bank_files(tmp_path / "parts")
    assert not (tmp_path / "parts" / "groups").exists() and not (tmp_path / "parts" / ".shards").exists()
    hdb(*words, tmp_path / "parts", "--shard", "merge")  # once more changes nothing


def dies_in_its_second_step() -> Any:
    real, steps = loop.step_losses, list[int]()

    def step(*arguments: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    return step


def test_a_merge_names_other_settings_and_other_people(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    words: list[object] = ["preoptimize", photos, "--base", micro_dir, "--device", "cpu", *SMALL]
    words += ["--steps", 1, "--set", "identities_per_batch=2", "--out", tmp_path / "bank", "--shard"]
    for number in (0, 1):
        hdb(*words, f"{number}/2")
    shutil.copytree(photos / "person-0", photos / "aaron")
    assert "of other input" in error(*words, "merge")
    shutil.rmtree(photos / "aaron")
    hdb(*words, "merge")


SETTINGS = {"lr": 0.1, "device": "cuda"}
KEYS = [f"unit-{k}" for k in range(7)]


def record(out: Path, of: int, numbers: Sequence[int], **settings: Any) -> None:
    for number in numbers:
        shard = Shard(number, of)
        shard.record(out, {**SETTINGS, **settings}, shard.part(KEYS))


def merge(out: Path, keys: Sequence[str] = KEYS, gone: Sequence[str] = ()) -> None:
    check_shards(out, {**SETTINGS, "device": "cpu"}, keys, lambda key: key not in gone)


def test_every_lack_has_its_sentence(tmp_path: Path) -> None:
    record(tmp_path, 3, [0, 1, 2])
    merge(tmp_path)
    with pytest.raises(InputError, match=r"shard 1/3: recorded as finished, but results are gone"):
        merge(tmp_path, gone=["unit-4"])
    with pytest.raises(InputError, match="finished before 1 of 8 units were added"):
        merge(tmp_path, [*KEYS, "new"])
    with pytest.raises(InputError, match="shard 2/3: of other input than there is now"):
        merge(tmp_path, [key for key in KEYS if key != "unit-5"])
    record(tmp_path, 3, [1], lr=0.5)
    with pytest.raises(InputError, match=r"shard 1/3 had other settings \(lr: 0.5 there, 0.1 here\)"):
        merge(tmp_path)
    record(tmp_path, 4, [3])
    with pytest.raises(InputError, match="parts of 3 and of 4"):
        merge(tmp_path)


def test_a_unit_that_two_shards_did_is_told(tmp_path: Path) -> None:
    record(tmp_path, 2, [0, 1])
    file = tmp_path / ".shards" / "1-of-2.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "units": [*data["units"], "unit-0"]}))
    with pytest.raises(InputError, match=r"shards 0/2, 1/2: .* did work twice"):
        merge(tmp_path)


@pytest.mark.parametrize("text", ["", "8/8", "1/", "/2", "-1/2", "a/b", "0/0", "Merge"])
def test_a_bad_shard_is_one_line(text: str, micro_photos: Path, tmp_path: Path) -> None:
    line = error("preoptimize", micro_photos, "--out", tmp_path / "x", "--shard", text)
    assert "expected I/N with I from 0 to N-1, or merge" in line
    assert not (tmp_path / "x").exists()


def test_cluster_and_shard_exclude_each_other(micro_photos: Path, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "x", "--shard", "0/2", "--cluster", "auto"]
    assert "leave one out" in error("preoptimize", micro_photos, *words)
