"""A hypernetwork trained on a Ray cluster is that of one process, also when a machine dies half-way."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from machines import machines

import eyes
from commands import hdb
from hyperdreambooth.events import read_events
from hyperdreambooth.files import load_tensors

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    # ray 2.60: Ray Train reads settings of Ray Data that Ray Data has given up
    pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning"),
]

SETTINGS = {
    "width": 16, "layers": 1, "heads": 2, "batch": 4, "warmup": 1, "save_every": 1, "log_every": 1,
    "validate_every": 100, "validation": 1, "draws": 1, "lr": 1e-3, "down_dim": 6, "up_dim": 4,
}  # fmt: skip


def lines(out: Path) -> list[dict[str, float]]:
    file = out / "run" / "log.jsonl"
    found = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, found) if "loss" in line]


def test_it_goes_on_with_the_machines_that_are_left(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    encoder = ["--set", f"encoder={eyes.resnet(tmp_path / 'eye')}"]
    # on CPUs: the make-believe GPUs of these machines cannot speak NCCL
    words = [micro_photos, "--base", micro_dir, "--device", "cpu", *encoder, *sets, "--steps", 12]
    hdb("train", *words, "--out", tmp_path / "alone")
    with machines(1) as running:
        second, out = running.add(), tmp_path / "spread"

        def kill_one() -> None:
            while len(lines(out)) < 3:
                time.sleep(0.05)
            running.kill(second)

        killer = threading.Thread(target=kill_one)
        killer.start()
        hdb("train", *words, "--out", out, "--cluster", running.address)
        killer.join()
    (lost,) = [event for event in read_events(out / "run" / "events.jsonl") if event["event"] == "lost"]
    assert re.match(r"worker \d \(.+\).*; all go on from the last checkpoint$", lost["what"])
    shown = hdb("watch", out).stdout
    assert f"lost         1, the last one: {lost['what']}" in shown and "state        finished" in shown
    losses = [[line["loss"] for line in lines(tmp_path / name)][-1] for name in ("alone", "spread")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = (load_tensors(tmp_path / name / "model.safetensors")[0] for name in ("alone", "spread"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
