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
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.setup import State, Training
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


def launching(processes: int, run: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command and environment of a training in several processes, which share each step's batch."""
    start = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    # accelerate 1.15: `--cpu` alone starts one process (the rest is for mpirun); this starts several
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [*start, *run] if processes > 1 else [sys.executable, *run], environment


def launch(processes: int, run: list[str]) -> None:
    line, environment = launching(processes, run)
    subprocess.run(line, check=True, env=environment)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def assert_equal(one: Path, several: Path) -> None:
    """Holds what float32 leaves of two trainings whose sums are added up in another order."""
    expected, got = weights(one), weights(several)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
    assert losses(several) == pytest.approx(losses(one), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "learn_basis", "counts"),
    [
        ("sd", True, (2,)),
        pytest.param("sd", False, (3, 4), marks=pytest.mark.slow),
        pytest.param("sdxl", True, (2, 4), marks=pytest.mark.slow),
    ],
)
def test_several_processes_equal_one(
    micro_dir: Path, micro_photos: Path, eye: Path, tmp_path: Path, family: str, learn_basis: bool,
    counts: tuple[int, ...],
) -> None:  # fmt: skip
    place = micro_dir
    if family == "sdxl":  # it never reads its first text encoder's last layer
        place = tmp_path / "base"
        pipelines.sdxl().save_pretrained(place)
    base = load_base(place, device="cpu")
    eyes.bank(base, tmp_path / "bank", ("person-0", "person-1", "person-2"))
    config = settings(eye, learn_basis=learn_basis, beta=0.5, lr=1e-3)
    train_hypernet(base, micro_photos, tmp_path / "1", config, tmp_path / "bank")
    for count in counts:
        out = tmp_path / str(count)
        launch(count, command(tmp_path, place, micro_photos, out, config, str(tmp_path / "bank")))
        assert_equal(tmp_path / "1", out)


@pytest.mark.slow
def test_goes_on_with_another_number_of_processes(
    micro_dir: Path, micro_photos: Path, eye: Path, tmp_path: Path
) -> None:
    config, out = settings(eye, lr=1e-3, steps=9, save_every=1, log_every=1), tmp_path / "changing"
    train_hypernet(load_base(micro_dir, device="cpu"), micro_photos, tmp_path / "1", config)
    run = command(tmp_path, micro_dir, micro_photos, out, config)
    for count, steps in ((4, 2), (1, 5)):  # killed once so many steps are logged
        line, environment = launching(count, run)
        process = subprocess.Popen(line, env=environment, start_new_session=True)
        while process.poll() is None and len(losses(out) if (out / "run/log.jsonl").exists() else []) < steps:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    launch(2, run)
    assert_equal(tmp_path / "1", out)


def test_only_the_hypernetwork_is_sent(
    micro_dir: Path, micro_photos: Path, eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sent = load_base(micro_dir, device="cpu"), list[State]()

    def recorded(training: Training, state: State, *rest: object) -> None:
        sent.append(state)

    monkeypatch.setattr("hyperdreambooth.hypernet.train.train", recorded)
    with pytest.raises(InputError):  # nothing was trained, so there is nothing to load
        train_hypernet(base, micro_photos, tmp_path / "h", settings(eye))
    [state] = sent
    wrapped = {id(p) for p in state.model.parameters() if p.requires_grad}
    assert wrapped == {id(p) for p in state.network.parameters() if p.requires_grad}
    assert not any(p.requires_grad for part in base.components.values() for p in part.parameters())
