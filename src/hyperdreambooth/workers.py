"""Processes that work side by side, end with their parent, and leave Ctrl-C to it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process

_MOST_ON_WINDOWS = 61  # one call there cannot wait for more processes, so the pool refuses more


def processes(asked: int | None) -> int:
    """Returns the number of processes to start: as many as asked for, or one for each core."""
    count = asked or os.cpu_count() or 1
    return min(count, _MOST_ON_WINDOWS) if sys.platform == "win32" else count


def pool(count: int) -> ProcessPoolExecutor:
    """Returns a pool of spawned processes, which work the same on every system."""
    return ProcessPoolExecutor(count, get_context("spawn"), begin)


def begin() -> None:
    """Makes a worker leave Ctrl-C to its parent, end when that is killed, and ignore Pillow's warnings."""
    # Pillow's warnings name no file, and we tell what is wrong with a photo. `catch_warnings` around a photo
    # would change the filters of all threads, which restore each other's and lose warnings for good.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
