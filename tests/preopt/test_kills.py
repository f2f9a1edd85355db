"""A bank that was killed at random moments is the bank of an uninterrupted run, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperdreambooth.lidb.bank import Bank

KILLED = """
import multiprocessing, random, resource, signal, sys
from pathlib import Path
import torch
from hyperdreambooth.base.load import load_base
from hyperdreambooth.preopt.bank_training import PreoptConfig, preoptimize

torch.set_num_threads(1)
source, photos, out, kills, steps = sys.argv[1:]
base = load_base(source, "cpu")
config = PreoptConfig(
    down_dim=8, up_dim=6, steps=int(steps), lr=5e-3, identities_per_batch=2,
    save_every=max(1, int(steps) // 4),
)

def work(folder, seconds):
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of computing, so a busy machine changes nothing
    preoptimize(base, Path(photos), Path(out, folder), config)

def finished(folder, seconds):
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder, seconds))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGPROF), child.exitcode
    return child.exitcode == 0

assert finished("whole", 0)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds, rng, killed = used.ru_utime + used.ru_stime, random.Random(0), 0
while not finished("killed", rng.uniform(0.01, 0.4) * seconds if killed < int(kills) else 0):
    killed += 1
print(killed)
"""


def killed_and_resumed(base: Path, photos: Path, out: Path, kills: int, steps: int) -> int:
    """Runs a bank through in one go, and another killed at random moments; one interpreter, a fork each.

    The kernel kills, by a signal nobody handles: like kill -9, not a line of Python runs after it.
    """
    command = [sys.executable, "-c", KILLED, str(base), str(photos), str(out), str(kills), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    whole, killed = Bank.open(out / "whole"), Bank.open(out / "killed")
    assert whole.identities == killed.identities
    assert len(whole) == 6
    assert torch.equal(whole.numbers(), killed.numbers())
    shards = sorted(path.name for path in (out / "whole").glob("shard-*"))
    assert shards == sorted(path.name for path in (out / "killed").glob("shard-*"))
    for name in [*shards, "index.json"]:
        assert (out / "whole" / name).read_bytes() == (out / "killed" / name).read_bytes()
    assert not (out / "killed" / "groups").exists()
    return int(done.stdout)


def test_killed_at_random_moments_is_the_same_bank(
    micro_dir: Path, micro_photos: Path, tmp_path: Path
) -> None:
    assert killed_and_resumed(micro_dir, micro_photos, tmp_path, kills=4, steps=4) >= 2


@pytest.mark.slow
def test_killed_ten_times_is_the_same_bank(micro_dir: Path, micro_photos: Path, tmp_path: Path) -> None:
    assert killed_and_resumed(micro_dir, micro_photos, tmp_path, kills=10, steps=20) >= 2
