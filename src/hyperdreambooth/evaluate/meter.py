"""What a method costs: seconds and peak memory of a block."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures the block that it manages.

    Attributes:
        seconds: how long the block took.
        megabytes: the most memory held in it: on CUDA what tensors took, elsewhere what the whole process
            took (Linux only); None where nobody can tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self.megabytes: float | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._resettable = _reset_peak()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.megabytes = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif self._resettable:
            self.megabytes = _peak()
        self.seconds = time.perf_counter() - self._began


def _reset_peak() -> bool:
    """Asks Linux to forget the highest memory so far; False where it cannot."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return _peak() is not None


def _peak() -> float | None:
    """The highest resident memory of this process since the reset, in MiB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None
