"""Rows computed once: what a frozen model makes of a photo or a caption never changes, so it stays on disk.

A cache folder holds shards in which a row is named by what it was made from. A shard appears whole and is
never changed, so any number of processes may fill one folder, and a killed one loses a few batches. Whatever
else the rows depend on (weights, size, preprocessing) belongs into the folder's own name: then nothing is
ever stale.
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
"""Name → tensor; all of them lead with the same axis."""

_NAMES = "names"
BATCHES = 16  # that one shard holds: 20,000 photos are 40 files and waits for the disk, not 625


def cached_rows(
    names: Sequence[str],
    make: Callable[[list[int]], Mapping[str, Tensor]],
    folder: Path,
    batch: int = 32,
    title: str = "encode",
) -> Rows:
    """The rows of `m` names, found in the folder or made and added to it.

    Rows that came in several batches are put together in one shard, which the next call maps into memory
    instead of reading: many processes then share one copy, and only what is used is ever loaded.

    Args:
        names: what the rows are made from, as hashes; the same name twice is made once.
        make: places in `names` → their rows, in that order.
        folder: of the shards; made when missing.
        batch: rows made at a time.
        title: of the progress bar.

    Returns:
        On the CPU, `m` rows each, in the order of `names`.
    """
    found = _open(_shard(folder, names))
    if found is not None and found[0] == list(names):
        return found[1]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    known = _look_up(folder, places)
    missing = sorted(place for name, place in places.items() if name not in known)
    waiting: list[tuple[list[int], Mapping[str, Tensor]]] = []
    with Progress(title, len(places), len(places) - len(missing)) as bar:
        try:
            for start in range(0, len(missing), batch):
                part = missing[start : start + batch]
                waiting.append((part, make(part)))
                bar.update(len(part))
                if len(waiting) == BATCHES:
                    known |= _keep(folder, names, waiting)
        finally:  # a broken photo costs nobody else's rows
            known |= _keep(folder, names, waiting)
    together = {key: torch.stack([known[name][key] for name in names]) for key in known[names[0]]}
    return _gather(folder, names, together) if len(places) > batch else together


def _keep(
    folder: Path, names: Sequence[str], waiting: list[tuple[list[int], Mapping[str, Tensor]]]
) -> dict[str, Rows]:
    """Writes what is waiting as one shard, empties the list, and returns name → its row of every tensor."""
    if not waiting:
        return {}
    chosen = [names[place] for part, _ in waiting for place in part]
    made = {key: torch.cat([rows[key].detach().cpu() for _, rows in waiting]) for key in waiting[0][1]}
    waiting.clear()
    _save(folder, chosen, made)
    written = _open(_shard(folder, chosen))  # mapped: what is made is not held in memory until all is
    made = written[1] if written is not None and written[0] == chosen else made
    return {name: {key: rows[at] for key, rows in made.items()} for at, name in enumerate(chosen)}


def _shard(folder: Path, names: Sequence[str]) -> Path:
    """Named by its names: whoever makes the same rows writes the same file."""
    return folder / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}.safetensors"


def _save(folder: Path, names: Sequence[str], rows: Mapping[str, Tensor]) -> None:
    shard = _shard(folder, names)
    try:
        save_tensors(shard, rows, {_NAMES: " ".join(names)})
    except PermissionError:  # Windows replaces nothing that another process has mapped: the same rows, then
        found = _open(shard)
        if found is None or found[0] != list(names) or found[1].keys() != rows.keys():
            raise


def _open(shard: Path) -> tuple[list[str], Rows] | None:
    """Names and memory-mapped rows of a shard; None where it is missing or damaged."""
    # another process may remove a shard at any moment: torch then raises a RuntimeError
    with suppress(SafetensorError, OSError, RuntimeError), safe_open(shard, framework="pt") as file:
        names = (file.metadata() or {}).get(_NAMES, "").split()
        rows = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if rows and all(len(tensor) == len(names) for tensor in rows.values()):
            return names, rows
    return None


def _shards(folder: Path) -> Iterator[tuple[Path, list[str], Rows]]:
    """All that can be read, in the order of their names."""
    for shard in sorted(folder.glob("[!.]*.safetensors")):
        if opened := _open(shard):
            yield shard, *opened


def _look_up(folder: Path, wanted: Mapping[str, int]) -> dict[str, Rows]:
    """Name → its row of every tensor, for those that some shard has."""
    found: dict[str, Rows] = {}
    for _, names, rows in _shards(folder):
        for at, name in enumerate(names):
            if name in wanted and name not in found:
                found[name] = {key: tensor[at] for key, tensor in rows.items()}
    return found


def _gather(folder: Path, names: Sequence[str], together: Rows) -> Rows:
    """Writes one shard in place of those it covers, and returns its memory-mapped rows."""
    _save(folder, names, together)
    covered = set(names)
    for shard, inside, _ in _shards(folder):
        if covered > set(inside):  # never one of the same rows: two processes would remove each other's
            with suppress(OSError):  # Windows keeps what another process has mapped
                shard.unlink()
    found = _open(_shard(folder, names))
    return found[1] if found is not None and found[0] == list(names) else together
