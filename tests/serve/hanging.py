"""A content filter that hangs the first time, for the test in which a worker dies in the middle of a job."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def once(kind: str, content: Any) -> None:
    """Writes the worker's number to the file that `HANGING` names, and hangs; the next worker goes on."""
    del kind, content
    file = Path(os.environ["HANGING"])
    if not file.exists():
        begun = file.with_suffix(".part")
        begun.write_text(str(os.getpid()))
        begun.rename(file)
        while True:
            time.sleep(60)
