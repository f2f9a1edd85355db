"""What is logged: what happened where, and nothing that a caller sent."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

logger = logging.getLogger("hyperdreambooth.serve")


def note_failure(error: BaseException) -> None:
    """Logs the kind of an unexpected error and its place; its message may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = (f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    logger.critical("%s in %s", type(error).__name__, " < ".join(reversed(list(places))))
