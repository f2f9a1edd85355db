"""A test that hangs fails by name, and the run ends (tests/suite.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has neither make nor killpg")

ROOT = Path(__file__).parent.parent
FINE = """
def test_fine(): pass
"""
LOOP = """
import time
def test_loop():
    while True: time.sleep(0.1)
"""
CHILD = """
import pathlib, subprocess, sys
def test_child():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    pathlib.Path("child").write_text(str(child.pid))
    child.wait()
"""
LOCK = """
import ctypes
def test_lock():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(256)  # PyDLL keeps Python's own lock
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


def run(folder: Path, **files: str) -> tuple[int, str]:
    """Runs a suite of these files with a limit of two seconds; returns its exit code and its report."""
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", folder, "-o", "faulthandler_timeout=4", "-n", "2"]
    command = [sys.executable, ROOT / "tests" / "suite.py", *options, folder]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**clean, "PYTEST_TIMEOUT": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_tests_that_hang_fail_and_the_others_go_on(tmp_path: Path) -> None:
    code, report = run(tmp_path, loop=LOOP, child=CHILD, fine=FINE)
    assert code == 1, report
    assert "FAILED test_loop.py::test_loop - Failed: Timeout" in report
    assert "FAILED test_child.py::test_child - Failed: Timeout" in report
    assert "2 failed, 1 passed" in report
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_test_that_no_signal_reaches_ends_the_run(tmp_path: Path) -> None:
    code, report = run(tmp_path, lock=LOCK, fine=FINE)
    assert code == 1, report
    assert "FAILED test_lock.py::test_lock" in report
