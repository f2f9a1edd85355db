"""Processes side by side that end with their parent, and leave Ctrl-C to it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process

_MOST_ON_WINDOWS = 61  # processes that one call there can wait for; the pool refuses more


def processes(asked: int | None) -> int:
    """As many as asked for, else one a core."""
    count = asked or os.cpu_count() or 1
    return min(count, _MOST_ON_WINDOWS) if sys.platform == "win32" else count


def pool(count: int) -> ProcessPoolExecutor:
    """So many spawned processes: they work the same on every system."""
    return ProcessPoolExecutor(count, get_context("spawn"), _begin)


def _begin() -> None:
    """Ctrl-C is the parent's to answer, and a worker whose parent was killed ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
