"""A bank that was killed at random moments is the bank of an uninterrupted run, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from banks import bank_files
from hyperdreambooth.lidb.bank import Bank
from kills import run_killed

TRAIN = """
from hyperdreambooth.base.load import load_base
from hyperdreambooth.preopt.bank_training import PreoptConfig, preoptimize

source, photos, steps = given
base = load_base(source, "cpu")
config = PreoptConfig(
    down_dim=8, up_dim=6, steps=int(steps), lr=5e-3, identities_per_batch=2,
    save_every=max(1, int(steps) // 4),
)

def run(folder):
    preoptimize(base, Path(photos), folder, config)
"""


def killed_and_resumed(base: Path, photos: Path, out: Path, kills: int, steps: int) -> int:
    """Runs a bank through in one go, and another killed at random moments."""
    count = run_killed(TRAIN, out, kills, [base, photos, steps], (0.01, 0.4))
    whole, killed = Bank.open(out / "whole"), Bank.open(out / "killed")
    assert whole.identities == killed.identities
    assert len(whole) == 6
    assert torch.equal(whole.numbers(), killed.numbers())
    assert bank_files(whole.folder) == bank_files(killed.folder)
    assert len([*(whole.folder / "shards").iterdir()]) == 3
    assert not (out / "killed" / "groups").exists()
    return count


def test_killed_at_random_moments_is_the_same_bank(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    assert killed_and_resumed(micro_dir, micro_photos, tmp_path, kills=4, steps=4) >= 2


@pytest.mark.slow
def test_killed_ten_times_is_the_same_bank(micro_dir: Path, micro_photos: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(micro_dir, micro_photos, tmp_path, kills=10, steps=20) >= 2
