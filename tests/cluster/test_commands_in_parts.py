"""prepare, predict and evaluate in shards, and predict for many people, leave what one process leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import micro
from commands import error, hdb
from hyperdreambooth.base.load import load_base
from hyperdreambooth.files import load_tensors
from hyperdreambooth.personalize import Personalizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path) -> Path:
    """A micro base with scorers, and a hypernetwork for it."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(micro_dir, folder / "base")
    micro.scorers(folder / "base" / "scorers")
    micro.hypernet(folder, load_base(folder / "base", device="cpu"))
    return folder


def on(world: Path) -> list[object]:
    return ["--base", world / "base", "--hypernet", world / "made", "--device", "cpu"]


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    found = [file for pattern in patterns for file in folder.rglob(pattern)]
    assert found
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


NAMES = [f"person-{k}.safetensors" for k in range(6)]


def same_adapter(one: Path, other: Path) -> bool:
    """The numbers and the header; the order in which a header is written is anybody's guess."""
    (ours, header), (theirs, told) = load_tensors(one), load_tensors(other)
    return (
        header == told
        and ours.keys() == theirs.keys()
        and all(map(torch.equal, ours.values(), theirs.values()))
    )


def without_times(report: Any) -> Any:
    """A report without what may differ between two runs: times, and the costs of trainings."""
    if isinstance(report, dict):
        left_out = {"seconds", "costs", "cost", "environment", "time", "megabytes"}
        return {key: without_times(value) for key, value in report.items() if key not in left_out}
    return [without_times(value) for value in report] if isinstance(report, list) else report


def test_prepared_in_shards(micro_photos: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(micro_photos, tmp_path / "photos")
    Image.new("RGB", (8, 8)).save(photos / "person-2" / "small.png")
    (photos / "person-3" / "torn.png").write_bytes(b"\x89PNG")
    words = ["prepare", photos, "--already-cropped", "--set", "size=32", "--workers", 1, "--out"]
    hdb(*words, tmp_path / "alone")
    for number in (2, 0):
        hdb(*words, tmp_path / "parts", "--shard", f"{number}/3")
    assert "shard 1/3: not finished" in error(*words, tmp_path / "parts", "--shard", "merge")
    hdb(*words, tmp_path / "parts", "--shard", "1/3")
    hdb(*words, tmp_path / "parts", "--shard", "merge")
    patterns = ("*.png", "*.txt", "*.jsonl")
    alone, parts = files(tmp_path / "alone", *patterns), files(tmp_path / "parts", *patterns)
    assert alone == parts and len(alone) > 15
    told = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "parts")]
    assert told[0]["counts"] == told[1]["counts"] and told[0]["counts"]["photos"] == 20
    assert told[0]["dropped"] == told[1]["dropped"] and len(told[0]["dropped"]) >= 2
    assert [file.name for file in (tmp_path / "parts").glob(".journal*")] == [".journal.sqlite"]


def test_two_photos_of_one_name_in_two_shards(micro_photos: Path, tmp_path: Path) -> None:
    """The first has the name, whoever comes to the second."""
    photos = shutil.copytree(micro_photos / "person-0", tmp_path / "photos" / "ana")
    Image.open(micro_photos / "person-1" / "0.png").save(photos / "0.jpg", quality=95)
    words = ["prepare", tmp_path / "photos", "--already-cropped", "--set", "size=32", "--workers", 1, "--out"]
    hdb(*words, tmp_path / "alone")
    for number in (1, 0):
        hdb(*words, tmp_path / "parts", "--shard", f"{number}/2")
    hdb(*words, tmp_path / "parts", "--shard", "merge")
    assert files(tmp_path / "alone", "*.png", "*.txt") == files(tmp_path / "parts", "*.png", "*.txt")


def test_predicted_for_many_people_and_in_shards(world: Path, micro_photos: Path, tmp_path: Path) -> None:
    hdb("predict", micro_photos, "--out", tmp_path / "alone", *on(world))
    me = Personalizer.from_pretrained(world / "base", world / "made", "cpu")
    photos = sorted((micro_photos / "person-4").glob("*.png"))
    me.predict([*photos]).save(tmp_path / "person-4.safetensors", "lidb")
    assert sorted(file.name for file in (tmp_path / "alone").glob("*.safetensors")) == NAMES
    assert same_adapter(tmp_path / "person-4.safetensors", tmp_path / "alone" / "person-4.safetensors")
    words = ["predict", micro_photos, "--out", tmp_path / "parts", *on(world), "--shard"]
    for number in (1, 0):
        hdb(*words, f"{number}/2")
    (tmp_path / "parts" / "person-3.safetensors").unlink()
    assert "shard 1/2: recorded as finished, but results are gone" in error(*words, "merge")
    hdb(*words, "1/2")
    hdb(*words, "merge")
    assert all(same_adapter(tmp_path / "alone" / name, tmp_path / "parts" / name) for name in NAMES)


def test_many_people_take_a_folder_and_one_person_takes_no_cluster(
    world: Path, micro_photos: Path, tmp_path: Path
) -> None:
    person = micro_photos / "person-0"
    words = ["--out", tmp_path / "x.safetensors", *on(world)]
    assert "sub-folder a person" in error("predict", person, *words, "--shard", "0/2")
    assert "sub-folder a person" in error("predict", person, *words, "--cluster", "auto")
    assert "ends in .safetensors" in error("predict", person, "--out", tmp_path / "x", *on(world))


def test_evaluated_in_shards(world: Path, micro_photos: Path, tmp_path: Path) -> None:
    rows = 'rows=["another-photo", "base", "prediction"]'
    words = ["evaluate", micro_photos, *on(world), "--set", rows, "--set", "draw_steps=1", "--identities", 4]
    words += ["--set", 'prompts=["a [V] face"]', "--set", "together=2", "--out"]
    hdb(*words, tmp_path / "alone")
    for number in (1, 0):
        hdb(*words, tmp_path / "parts", "--shard", f"{number}/2")
    assert not (tmp_path / "parts" / "report.json").exists()
    hdb(*words, tmp_path / "parts", "--shard", "merge")
    patterns = ("pictures/*/*.png", "scores/*/*.json")
    assert files(tmp_path / "alone", *patterns) == files(tmp_path / "parts", *patterns)
    told = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "parts")]
    assert without_times(told[0]["rows"]) == without_times(told[1]["rows"])
