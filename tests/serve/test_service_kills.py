"""Processes are killed with -9 at random moments: every accepted job ends exactly once, and none is lost.

`python tests/serve/killing.py --kills 100` is the long form.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from services import BOTH

SCRIPT = Path(__file__).parent / "killing.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@BOTH
def test_kills_lose_nothing_and_do_nothing_twice(database_url: str) -> None:
    words = ["--kills", "10", "--jobs", "20", *(["--database", database_url] if database_url else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=850)
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["broken"] == [] and found["left"] == 0
    assert found["accepted"] == 20 and sum(found["kills"].values()) == 10
