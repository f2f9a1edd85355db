"""Runs work in one go, and again while it is killed at random moments: one interpreter, a fork each time.

The kernel kills, by a signal that nobody handles: as with kill -9, no line of Python runs after it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """
import multiprocessing, random, resource, shutil, signal, sys
from pathlib import Path
import torch

torch.set_num_threads(1)
out, kills, least, most, *given = sys.argv[1:]
{setup}

def work(folder, seconds):
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of computing, so a busy machine changes nothing
    run(Path(out, folder))

def finished(folder, seconds):
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder, seconds))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGPROF), child.exitcode
    return child.exitcode == 0

assert finished("whole", 0)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds, rng, killed = used.ru_utime + used.ru_stime, random.Random(0), 0
while True:
    share = rng.uniform(float(least), float(most)) if killed < int(kills) else 0
    if not finished("killed", share * seconds):
        killed += 1
    elif killed:
        break
    else:  # one core computes twice as fast when its neighbour rests: once more, and earlier
        shutil.rmtree(Path(out, "killed"))
        seconds /= 2
print(killed)
"""


def run_killed(
    setup: str, out: Path, kills: int, given: Sequence[object], shares: tuple[float, float]
) -> int:
    """Makes `out/whole` in one go, and `out/killed` with kills; returns how many there were.

    `setup` is Python that defines `run(folder)` and may read the words `given`. A kill comes after a share of
    the seconds of the whole run, drawn between the two `shares`.
    """
    words = [out, kills, *shares, *given]
    command = [sys.executable, "-c", _SCRIPT.format(setup=setup), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
