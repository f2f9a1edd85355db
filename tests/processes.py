"""Processes that start in a tenth of a second and run torch on any number of threads.

A plain fork of the test process copies what torch's threads hold but not the threads, and its first parallel
operation waits for them for ever. So the children are forked by a server that has imported torch and never
run it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(_METHOD)
CHEAP = pytest.mark.skipif(_METHOD == "spawn", reason="Windows starts a new interpreter for every process")


def start(target: Callable[..., None], *words: Any) -> BaseProcess:
    """Begins `target(*words)`, a function of a test module, in a process of its own."""
    CONTEXT.set_forkserver_preload(
        ["torch", "pytest", "hyperdreambooth.faces.latents", "hyperdreambooth.faces.prepare"]
    )
    process = CONTEXT.Process(target=target, args=words)
    process.start()
    return process
