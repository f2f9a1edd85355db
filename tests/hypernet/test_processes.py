"""Trainings in processes of their own: killed at any moment, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_train import assert_same, lines, settings, weights

import eyes
import pipelines
from hyperdreambooth.base.load import load_base
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.train import train_hypernet

SCRIPT = """
import sys
from hyperdreambooth.base.load import load_base
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.train import train_hypernet

base, photos, out, config, bank = sys.argv[1:6]
made = HypernetConfig.model_validate_json(config)
train_hypernet(load_base(base, device="cpu"), photos, out, made, bank or None)
"""


def command(
    folder: Path, base: Path, photos: Path, out: Path, config: HypernetConfig, bank: str = ""
) -> list[str]:
    """The arguments of a script that trains, for a process of its own."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [str(script), str(base), str(photos), str(out), config.model_dump_json(exclude_unset=True), bank]


@pytest.mark.slow
def test_killed_at_any_moment_ends_with_the_same_weights(
    micro_dir: Path, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    config, out = settings(eye, steps=40, save_every=3), tmp_path / "h"
    run = [sys.executable, *command(tmp_path, micro_dir, micro_photos, out, config)]
    train_hypernet(load_base(micro_dir, device="cpu"), micro_photos, tmp_path / "whole", config)
    for size in (0, 400, 1200):  # killed once the log has grown past that: somewhere in a step
        process = subprocess.Popen(run)
        log = out / "run" / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size > size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(run, check=True)
    assert_same(tmp_path / "whole", out)


@pytest.mark.parametrize(
    ("family", "learn_basis"),
    [
        ("sd", True),
        pytest.param("sd", False, marks=pytest.mark.slow),
        pytest.param("sdxl", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(
    micro_dir: Path, micro_photos: Path, eye: Path, tmp_path: Path, family: str, learn_basis: bool
) -> None:
    place = micro_dir
    if family == "sdxl":  # it never reads its first text encoder's last layer
        place = tmp_path / "base"
        pipelines.sdxl().save_pretrained(place)
    base = load_base(place, device="cpu")
    eyes.bank(base, tmp_path / "bank", ("person-0", "person-1", "person-2"))
    config = settings(eye, learn_basis=learn_basis, beta=0.5, lr=1e-3)
    train_hypernet(base, micro_photos, tmp_path / "one", config, tmp_path / "bank")
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    # accelerate 1.15: `--cpu` alone starts one process (the rest is mpirun's matter); this starts two, gloo
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = command(tmp_path, place, micro_photos, tmp_path / "two", config, str(tmp_path / "bank"))
    subprocess.run([*launch, *run], check=True, env=environment)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
