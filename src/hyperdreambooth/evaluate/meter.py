"""What a method costs: the seconds and the peak memory of a block."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Measured:
    """The measurements of a block, complete when the block has ended.

    `megabytes` is the peak memory in MiB: of tensors on CUDA, of the whole process elsewhere (Linux only);
    None if the system does not report it.
    """

    seconds: float = 0.0
    megabytes: float | None = None


@contextmanager
def measured(device: torch.device) -> Generator[Measured]:
    """Measures the block that it manages."""
    found = Measured()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux alone can reset the peak
            _RESET.write_text("5")
            found.megabytes = _peak()
    began = time.perf_counter()
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found.megabytes = torch.cuda.max_memory_allocated(device) / 2**20
    elif found.megabytes is not None:
        found.megabytes = _peak()
    found.seconds = time.perf_counter() - began


def _peak() -> float | None:
    """Returns the highest resident memory of this process since the reset, in MiB."""
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
