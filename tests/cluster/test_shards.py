"""A bank made in parts by separate processes is that of one process, or a line says what is missing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import micro
import processes
from banks import bank_files
from commands import SMALL, error, hdb
from hyperdreambooth.cluster.shards import Shard, check_shards
from hyperdreambooth.files import InputError
from hyperdreambooth.training import loop


def dies_in_its_second_step(words: list[str], environ: dict[str, str], threads: int) -> None:
    """Runs a command that is killed by -9 in a step that a checkpoint comes before."""
    torch.set_num_threads(threads)
    os.environ |= environ  # of the test, not of the server that forks its processes
    real, steps = loop.step_inputs, list[int]()

    def step(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    loop.step_inputs = step
    hdb(*words)


@processes.CHEAP
def test_shards_in_any_order_two_of_them_killed_are_the_same_bank(
    micro_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, parts = micro.photos(tmp_path / "photos", identities=10, each=1), tmp_path / "parts"
    words: list[object] = ["preoptimize", photos, "--base", micro_dir, "--device", "cpu", *SMALL]
    words += ["--steps", 3, "--set", "identities_per_batch=1", "--set", "save_every=1", "--out"]
    hdb(*words, tmp_path / "alone")
    assert "no shard has finished here" in error(*words, parts, "--shard", "merge")
    order = [*range(8)]
    random.Random(1).shuffle(order)
    killed = order[2:6:3]
    for number in order:
        if number in killed:
            command = [str(word) for word in [*words, parts, "--shard", f"{number}/8"]]
            told = command, dict(os.environ), torch.get_num_threads()
            process = processes.start(dies_in_its_second_step, *told)
            process.join()
            assert process.exitcode == -signal.SIGKILL
        else:
            hdb(*words, parts, "--shard", f"{number}/8")
    assert not (parts / "manifest.json").exists()  # nobody enters the bank before the merge
    assert len([*(parts / "groups").glob("*/checkpoint-1")]) == 2
    line = error(*words, parts, "--shard", "merge")
    assert all(f"{number}/8" in line for number in killed) and "not finished" in line
    for number in killed:
        hdb(*words, parts, "--shard", f"{number}/8")
    monkeypatch.setattr(loop, "step_inputs", None)  # a merge trains nobody
    hdb(*words, parts, "--shard", "merge")
    made = bank_files(parts)
    assert bank_files(tmp_path / "alone") == made and len(made) == 10 + 3
    assert not (parts / "groups").exists() and not (parts / ".shards").exists()
    hdb(*words, parts, "--shard", "merge")  # once more changes nothing
    assert bank_files(parts) == made


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
