"""Runs the tests in parallel, ends however they end, and leaves no process behind.

python tests/suite.py [any option of pytest]        # what `make test` calls

A test that hangs fails in one of three ways:
1. After `timeout` seconds (pyproject.toml) pytest-timeout interrupts it by a signal. The other tests go on.
2. Code that holds the interpreter's lock never sees that signal. `faulthandler_timeout` then ends the worker.
   `--max-worker-restart 0` makes pytest-xdist report the test and stop: by default it starts another worker
   and gives it the same file again, for ever.
3. After `LIMIT` seconds the whole run is killed. That is for what hangs outside a test, such as an import.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

LIMIT = 45 * 60
# the tests of a file share their fixtures, so a file stays on one worker
PARALLEL = ["-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--max-worker-restart", "0"]


def main(options: list[str]) -> int:
    """Returns pytest's exit code, or 124 if the run passed the limit."""
    # a session of its own: so one signal reaches pytest, its workers and whatever the tests have started
    command = [sys.executable, "-m", "pytest", *PARALLEL, *options]
    run = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        """Passes Ctrl-C and `kill` on to pytest, which then reports what it has."""
        run.send_signal(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    try:
        return run.wait(LIMIT)
    except subprocess.TimeoutExpired:
        print(f"error: the tests ran for more than {LIMIT} s and were killed", file=sys.stderr)
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
