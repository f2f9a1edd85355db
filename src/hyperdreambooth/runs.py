"""Run folders that resume, a record of the environment, and random generators by name."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from hyperdreambooth.events import Events
from hyperdreambooth.files import (
    InputError,
    check_writable,
    discard,
    load_tensors,
    read_json,
    room_for,
    save_tensors,
    whole_file,
    whole_folder,
    write_json,
)
from hyperdreambooth.trackers import track

if TYPE_CHECKING:  # torch takes seconds, which the check of a run folder need not take
    import torch
    from torch import Tensor


@functools.cache
def _commit() -> str | None:
    """Returns the commit of the source, with -dirty after edits; None if git does not track this file."""
    here = Path(__file__)
    git = ["git", "--no-optional-locks", "-C", str(here.parent)]
    try:
        for command in (f"ls-files --error-unmatch {here.name}", "describe --always --dirty --abbrev=40"):
            words = [*git, *command.split()]
            done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, str]:
    """Returns versions, platform and commit, to be stored with every result."""
    stamp = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("hyperdreambooth", "torch", "diffusers", "transformers", "peft", "accelerate"):
        with suppress(importlib.metadata.PackageNotFoundError):
            stamp[package] = importlib.metadata.version(package)
    commit = _commit()
    return {**stamp, "commit": commit} if commit else stamp


def rng(*key: int | str) -> torch.Generator:
    """Returns a CPU generator named by a key, for example `rng(seed, identity, step)`.

    It depends on nothing else. So a resumed run draws the same numbers as an uninterrupted one, and an
    identity's noise does not depend on the rest of the batch.
    """
    import torch

    name = json.dumps([part if isinstance(part, str) else index(part) for part in key])
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a nested state as JSON, its tensors moved to `tensors`; `"$"` marks types that JSON lacks."""
    from torch import Tensor

    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"$": "tensor", "of": name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != "$" for key in value):
            return {key: _pack(item, tensors) for key, item in value.items()}
        pairs = [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]
        return {"$": "dict", "of": pairs}  # the state of an optimizer has integer keys
    if isinstance(value, tuple):
        return {"$": "tuple", "of": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverts `_pack`."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get("$"):
        case None:
            return {key: _unpack(item, tensors) for key, item in value.items()}
        case "tensor":
            return tensors[value["of"]]
        case "tuple":
            return tuple(_unpack(item, tensors) for item in value["of"])
        case _:
            return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["of"]}


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Lists the keys in which two configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        parts = [_differences(old.get(name), new.get(name), f"{key}.{name}".strip(".")) for name in names]
        return [line for part in parts for line in part]
    return [] if old == new else [f"{key} was {json.dumps(old)}, now {json.dumps(new)}"]


def recorded_inputs(folder: Path) -> Mapping[str, str] | None:
    """Returns the inputs of a folder's run; None for another folder: models have a config.json, too."""
    file = folder / "config.json"
    recorded = read_json(file) if file.is_file() else None
    if isinstance(recorded, dict) and recorded.keys() == {"config", "inputs"}:
        return recorded["inputs"]
    return None


def check_run(folder: Path) -> None:
    """Refuses a run folder that holds other files, which the run might replace, or cannot be written to."""
    others = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
    if others and recorded_inputs(folder) is None:
        expected = "expected a new or empty folder, or one of an earlier run"
        raise InputError(f"out {folder}: {expected}; pass another --out")
    check_writable(folder)


class Run:
    """A run folder: config.json, environment.json, log.jsonl, events.jsonl, checkpoint-STEP/.

    The same command resumes it. Trackers that `HDB_TRACKERS` names get every line of the log (trackers.py).

    A folder of another config is refused, and one of other `inputs`: fingerprints of base and photos.
    """

    def __init__(self, folder: Path, config: BaseModel, *, inputs: Mapping[str, str] = {}) -> None:
        self.folder = Path(folder)
        file = self.folder / "config.json"
        wanted = json.loads(json.dumps({"config": config.model_dump(mode="json"), "inputs": dict(inputs)}))
        if not file.exists():
            write_json(file, wanted)
        elif differing := _differences(read_json(file), wanted):
            advice = "use another --out or delete the folder"
            raise InputError(f"{self.folder}: a run of another config ({'; '.join(differing)}); {advice}")
        write_json(self.folder / "environment.json", environment())
        self.events = Events(self.folder / "events.jsonl")
        log = self.folder / "log.jsonl"
        if log.exists() and log.read_bytes()[-1:] not in (b"", b"\n"):  # a kill cut off the last line
            with log.open("a", encoding="utf-8") as lines:
                lines.write("\n")

    def log(self, step: int, **figures: float | str | None) -> None:
        """Appends a line to log.jsonl; NaN and infinity become null, so that every line is JSON."""
        numbers = {name: _figure(value) for name, value in figures.items()}
        line = {"step": step, "time": round(time.time(), 3), **numbers}
        file = self.folder / "log.jsonl"
        with room_for(file), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        track(self.folder, step, numbers)

    def save(self, step: int, state: Mapping[str, Any], keep: int = 2) -> None:
        """Writes the checkpoint of a step, then deletes all but the newest `keep`.

        `state` nests dicts, lists and tuples of tensors and plain values, such as an optimizer's state dict.
        """
        tensors: dict[str, Tensor] = {}
        with whole_folder(self.folder / f"checkpoint-{step}") as folder:
            write_json(folder / "tree.json", _pack(state, tensors))
            save_tensors(folder / "tensors.safetensors", tensors)
        self.events.add("checkpoint", step=step)
        older = [number for number in self._steps() if number <= step]
        for number in self._steps():  # a later one is unreadable, or this run would have resumed from it
            if number not in older[:keep]:
                discard(self.folder / f"checkpoint-{number}")
        for left in self.folder.glob(".checkpoint-*.tmp"):  # left by a kill
            discard(left)

    def _steps(self) -> list[int]:
        """Returns the steps of the existing checkpoints, newest first."""
        names = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def latest(self) -> tuple[int, Any] | None:
        """Returns the newest readable checkpoint as (step, state), or None; cuts the log back to it."""
        found: tuple[int, Any] | None = None
        for step in self._steps():
            folder = self.folder / f"checkpoint-{step}"
            with suppress(InputError, LookupError, ValueError, TypeError):
                tensors, _ = load_tensors(folder / "tensors.safetensors", finite=False)
                found = step, _unpack(read_json(folder / "tree.json"), tensors)
                break
        self._cut_log(found[0] if found else -1)
        return found

    def _cut_log(self, last: int) -> None:
        """Deletes incomplete lines, and those after step `last`, which will be written again."""
        file, kept = self.folder / "log.jsonl", ""
        if not file.exists():
            return
        lines = file.read_text(encoding="utf-8", errors="replace")
        for line in lines.splitlines(keepends=True):
            with suppress(ValueError, LookupError, TypeError):
                kept += line if json.loads(line)["step"] <= last else ""
        if kept != lines:
            with whole_file(file) as temporary:
                temporary.write_text(kept, encoding="utf-8")

    def clear(self) -> None:
        """Deletes the checkpoints of a finished run."""
        for step in self._steps():
            discard(self.folder / f"checkpoint-{step}")


def _figure(value: Any) -> float | int | str | None:
    """Returns a value, which may be a tensor, as JSON."""
    from torch import Tensor

    if value is None or isinstance(value, (str, int)):
        return value
    number = float(value.detach() if isinstance(value, Tensor) else value)
    return number if math.isfinite(number) else None
