"""What a long job leaves on disk: a run folder that resumes, a stamp of the machine, named randomness."""

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
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from hyperdreambooth.files import (
    InputError,
    check_writable,
    discard,
    load_tensors,
    read_json,
    save_tensors,
    whole_file,
    whole_folder,
    write_json,
)


@functools.cache
def _commit() -> str | None:
    """The commit of the source, if this very file is tracked by git; ends in -dirty when edited since."""
    here = Path(__file__)
    git = ["git", "--no-optional-locks", "-C", str(here.parent)]
    try:
        for command in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40"],
        ):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, str]:
    """Versions, machine and commit, to be kept beside every result."""
    stamp = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("hyperdreambooth", "torch", "diffusers", "transformers", "peft", "accelerate"):
        with suppress(importlib.metadata.PackageNotFoundError):
            stamp[package] = importlib.metadata.version(package)
    commit = _commit()
    return {**stamp, "commit": commit} if commit else stamp


def rng(*key: int | str) -> torch.Generator:
    """A CPU generator named by ``key``, for example ``rng(seed, identity, step)``.

    It depends on nothing else: a resumed run draws what the uninterrupted one would have, and no identity's
    noise depends on who else is in the batch.
    """
    words = json.dumps([word if isinstance(word, str) else index(word) for word in key])
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON, its tensors moved into ``tensors``; ``"$"`` marks what JSON has no form for."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"$": "tensor", "of": name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key != "$" for key in value):
            return {key: _pack(item, tensors) for key, item in value.items()}
        pairs = [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]
        return {"$": "dict", "of": pairs}  # an optimiser's state has integer keys
    if isinstance(value, tuple):
        return {"$": "tuple", "of": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``_pack``."""
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
    """The keys in which two configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        parts = [_differences(old.get(name), new.get(name), f"{key}.{name}".strip(".")) for name in names]
        return [line for part in parts for line in part]
    return [] if old == new else [f"{key} was {json.dumps(old)}, now {json.dumps(new)}"]


def recorded_inputs(folder: Path) -> Mapping[str, str] | None:
    """What the run of a folder was fed; None where no run has been: models have a config.json, too."""
    file = folder / "config.json"
    told = read_json(file) if file.is_file() else None
    return told["inputs"] if isinstance(told, dict) and told.keys() == {"config", "inputs"} else None


def check_run(folder: Path) -> None:
    """Refuses a run folder with somebody else's files in it, which those of the run might replace.

    Raises:
        InputError: naming it, also where nothing can be written.
    """
    others = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
    if others and recorded_inputs(folder) is None:
        raise InputError(
            f"out {folder}: expected a new or empty folder, or one of an earlier run; pass another --out"
        )
    check_writable(folder)


class Run:
    """A run folder: config.json, environment.json, log.jsonl, checkpoint-STEP/; the same command resumes it.

    Args:
        folder: where; made when missing.
        config: the resolved config; a folder of another config is refused.
        inputs: fingerprints of what the run is fed (base, photos), compared like the config.

    Raises:
        InputError: the folder belongs to a run of another config or other inputs.
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
        log = self.folder / "log.jsonl"
        torn = log.exists() and log.read_bytes()[-1:] not in (b"", b"\n")
        self._mend = "\n" if torn else ""  # a run may have been killed within its last line

    def log(self, step: int, **figures: float | str | None) -> None:
        """Append one line to log.jsonl; a NaN becomes null, so that every line is JSON."""
        numbers = {name: _figure(value) for name, value in figures.items()}
        line = {"step": step, "time": round(time.time(), 3), **numbers}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(self._mend + json.dumps(line) + "\n")
        self._mend = ""

    def save(self, step: int, state: Mapping[str, Any], keep: int = 2) -> None:
        """Write the checkpoint of ``step`` whole, then remove all but the newest ``keep``.

        Args:
            step: steps done.
            state: nested dicts, lists and tuples of tensors and plain values, as optimisers give them.
            keep: how many stay.
        """
        tensors: dict[str, Tensor] = {}
        with whole_folder(self.folder / f"checkpoint-{step}") as folder:
            write_json(folder / "tree.json", _pack(state, tensors))
            save_tensors(folder / "tensors.safetensors", tensors)
        older = [number for number in self._steps() if number <= step]
        for number in self._steps():  # a later one is unreadable, else this run would have gone on from it
            if number not in older[:keep]:
                discard(self.folder / f"checkpoint-{number}")
        for left in self.folder.glob(".checkpoint-*.tmp"):  # from a kill
            discard(left)

    def _steps(self) -> list[int]:
        """The steps of the checkpoints that are there, newest first."""
        names = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def latest(self) -> tuple[int, Any] | None:
        """The newest readable checkpoint as (step, state), or None; the log is cut back to that step."""
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
        """Drop the lines past ``last`` (they will be written again) and a torn one."""
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
        self._mend = ""

    def clear(self) -> None:
        """Remove the checkpoints: the run is done and its result written."""
        for step in self._steps():
            discard(self.folder / f"checkpoint-{step}")


def _figure(value: Any) -> float | int | str | None:
    """A number that may come as a tensor, as JSON."""
    if value is None or isinstance(value, (str, int)):
        return value
    number = float(value.detach() if isinstance(value, Tensor) else value)
    return number if math.isfinite(number) else None
