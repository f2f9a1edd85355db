"""A cache on disk for the outputs of frozen models, which never change for the same photo or caption.

A folder holds shards of rows, each row named by the hash of its input. Shards appear whole and never change,
so many processes may fill a folder. Its name must contain all else that rows depend on (weights, size, …).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperdreambooth.files import save_tensors
from hyperdreambooth.progress import Progress

Rows: TypeAlias = dict[str, Tensor]
"""Name → tensor; the first axis of all of them has the same length."""

_NAMES = "names"
BATCHES = 16  # batches in one shard: 20,000 photos make 40 files and 40 writes instead of 625


def cached_rows(
    names: Sequence[str],
    encode: Callable[[list[int]], Mapping[str, Tensor]],
    folder: Path,
    batch: int = 32,
    title: str = "encode",
) -> Rows:
    """Returns the rows of `m` inputs, read from the folder or encoded and added to it.

    Rows that were encoded in several batches are merged into one shard, which the next call maps into memory.
    Many processes then share one copy, and only the rows in use are loaded.

    `names` are hashes of the inputs; a repeated one is encoded once. `encode` maps positions to their rows.
    """
    if (found := _open_exact(folder, names)) is not None:
        return found
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    known = {
        name: {key: tensor[at] for key, tensor in rows.items()}
        for _, inside, rows in _shards(folder)
        for at, name in enumerate(inside)
        if name in places
    }
    missing = sorted(place for name, place in places.items() if name not in known)
    waiting: list[tuple[list[int], Mapping[str, Tensor]]] = []
    with Progress(title, len(places), len(places) - len(missing)) as bar:
        try:
            for start in range(0, len(missing), batch):
                part = missing[start : start + batch]
                waiting.append((part, encode(part)))
                bar.update(len(part))
                if len(waiting) == BATCHES:
                    known |= _write(folder, names, waiting)
        finally:  # one broken photo must not cost the rows of the others
            known |= _write(folder, names, waiting)
    merged = {key: torch.stack([known[name][key] for name in names]) for key in known[names[0]]}
    return _merge(folder, names, merged) if len(places) > batch else merged


def _write(
    folder: Path, names: Sequence[str], waiting: list[tuple[list[int], Mapping[str, Tensor]]]
) -> dict[str, Rows]:
    """Writes the waiting batches as one shard, empties the list, and returns name → row of every tensor."""
    if not waiting:
        return {}
    chosen = [names[place] for part, _ in waiting for place in part]
    made = {key: torch.cat([rows[key].detach().cpu() for _, rows in waiting]) for key in waiting[0][1]}
    waiting.clear()
    made = _save(folder, chosen, made)
    return {name: {key: rows[at] for key, rows in made.items()} for at, name in enumerate(chosen)}


def _shard(folder: Path, names: Sequence[str]) -> Path:
    """Returns the path of a shard, which follows from its names: equal rows are written to the same file."""
    return folder / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}.safetensors"


def _save(folder: Path, names: Sequence[str], rows: Rows) -> Rows:
    """Writes a shard and returns its rows, mapped, so that they need not stay in memory."""
    try:
        save_tensors(_shard(folder, names), rows, {_NAMES: " ".join(names)})
    except PermissionError:  # Windows does not replace a mapped file, but then it should hold the same rows
        if (_open_exact(folder, names) or {}).keys() != rows.keys():
            raise
    return _open_exact(folder, names) or rows


def _open_exact(folder: Path, names: Sequence[str]) -> Rows | None:
    """Returns the rows of the shard of exactly these names; None if it is missing or damaged."""
    found = _open(_shard(folder, names))
    return found[1] if found is not None and found[0] == list(names) else None


def _open(shard: Path) -> tuple[list[str], Rows] | None:
    """Returns the names and the memory-mapped rows of a shard; None if it is missing or damaged."""
    # another process may remove a shard at any moment, which torch reports as a RuntimeError
    with suppress(SafetensorError, OSError, RuntimeError), safe_open(shard, framework="pt") as file:
        names = (file.metadata() or {}).get(_NAMES, "").split()
        rows = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if rows and all(len(tensor) == len(names) for tensor in rows.values()):
            return names, rows
    return None


def _shards(folder: Path) -> Iterator[tuple[Path, list[str], Rows]]:
    """Yields all readable shards in the order of their file names."""
    for shard in sorted(folder.glob("[!.]*.safetensors")):
        if opened := _open(shard):
            yield shard, *opened


def _merge(folder: Path, names: Sequence[str], rows: Rows) -> Rows:
    """Writes one shard, removes those whose rows are all in it, and returns the memory-mapped rows."""
    merged = _save(folder, names, rows)
    covered = set(names)
    for shard, inside, _ in _shards(folder):
        if covered > set(inside):  # a strict superset, or two processes would remove each other's shard
            with suppress(OSError):  # Windows keeps a file that another process has mapped
                shard.unlink()
    return merged
