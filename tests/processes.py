"""Starts processes in a tenth of a second that can run torch on any number of threads.

A plain fork of the test process copies the locks of torch's threads but not the threads, so its first
parallel operation waits for ever. A server that has imported torch, but never run it, forks these instead.
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


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Runs `target(*arguments)`, a function of a test module, in a new process."""
    CONTEXT.set_forkserver_preload(
        ["torch", "pytest", "hyperdreambooth.faces.latents", "hyperdreambooth.faces.prepare"]
    )
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process
