"""TensorBoard, W&B, trackio and others, through accelerate's trackers: `HDB_TRACKERS=tensorboard,wandb`.

They are chosen by the environment, as their own settings are, and not by a config: a run that is watched
with another tool is the same run.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperdreambooth.files import InputError

VARIABLE = "HDB_TRACKERS"


def track(folder: Path, step: int, figures: Mapping[str, Any]) -> None:
    """Hands the figures of a step to every tracker that the environment names."""
    for name in filter(None, os.environ.get(VARIABLE, "").replace(" ", "").split(",")):
        _started(name, folder).log({key: value for key, value in figures.items() if value is not None}, step)


@functools.cache
def _started(name: str, folder: Path) -> Any:
    """Returns a running tracker; it is closed when the process ends."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise InputError(f"{VARIABLE}: expected names among {known}, got {name!r}")
    if name not in map(str, get_available_trackers()):
        raise InputError(f"{VARIABLE}: {name} is not installed; pip install {name}")
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": folder / "trackers"} if kind.requires_logging_directory else {}
    tracker = kind("hyperdreambooth", **place)
    PartialState()  # which accelerate's own log needs
    tracker.start()
    atexit.register(tracker.finish)
    return tracker
