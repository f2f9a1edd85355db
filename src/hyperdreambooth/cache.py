"""A cache on disk for the outputs of frozen models, which never change for the same photo or caption.

A cache folder holds shards of rows, each row named by the hash of its input. A shard appears whole and never
changes, so any number of processes may fill one folder, and a killed process loses a few batches. The name of
the folder must contain everything else that the rows depend on (weights, size, preprocessing). So no row is
ever out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    encode: Callable[[Sequence[list[int]]], Iterable[Mapping[str, Tensor]]],
    folder: Path,
    batch: int = 32,
    title: str = "encode",
) -> Rows:
    """Returns the rows of `m` inputs, read from the folder or encoded and added to it.

    Rows that were encoded in several batches are merged into one shard, which the next call maps into memory.
    Many processes then share one copy, and only the rows in use are loaded.

    Args:
        names: the hashes of the inputs; a repeated name is encoded once.
        encode: takes all batches that are missing, each a list of positions in `names`, and yields the rows
            of one batch after the other, so that it can read ahead.
        folder: the folder of the shards; it is created when missing.
        batch: the number of rows encoded at a time.
        title: the label of the progress bar.

    Returns:
        Tensors on the CPU with `m` rows each, in the order of `names`.
    """
    found = _open(_shard(folder, names))
    if found is not None and found[0] == list(names):
        return found[1]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    known = _look_up(folder, places)
    missing = sorted(place for name, place in places.items() if name not in known)
    batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    waiting: list[tuple[list[int], Mapping[str, Tensor]]] = []
    with Progress(title, len(places), len(places) - len(missing)) as bar:
        try:
            for part, rows in zip(batches, encode(batches), strict=True):
                waiting.append((part, rows))
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
    _save(folder, chosen, made)
    written = _open(_shard(folder, chosen))  # mapped, so that the rows need not stay in memory
    made = written[1] if written is not None and written[0] == chosen else made
    return {name: {key: rows[at] for key, rows in made.items()} for at, name in enumerate(chosen)}


def _shard(folder: Path, names: Sequence[str]) -> Path:
    """Returns the path of a shard, which follows from its names: equal rows are written to the same file."""
    return folder / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}.safetensors"


def _save(folder: Path, names: Sequence[str], rows: Mapping[str, Tensor]) -> None:
    shard = _shard(folder, names)
    try:
        save_tensors(shard, rows, {_NAMES: " ".join(names)})
    except PermissionError:  # Windows does not replace a mapped file, but then it should hold the same rows
        found = _open(shard)
        if found is None or found[0] != list(names) or found[1].keys() != rows.keys():
            raise


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


def _look_up(folder: Path, wanted: Mapping[str, int]) -> dict[str, Rows]:
    """Returns name → row of every tensor, for the wanted names that are in some shard."""
    found: dict[str, Rows] = {}
    for _, names, rows in _shards(folder):
        for at, name in enumerate(names):
            if name in wanted and name not in found:
                found[name] = {key: tensor[at] for key, tensor in rows.items()}
    return found


def _merge(folder: Path, names: Sequence[str], rows: Rows) -> Rows:
    """Writes one shard, removes those whose rows are all in it, and returns the memory-mapped rows."""
    _save(folder, names, rows)
    covered = set(names)
    for shard, inside, _ in _shards(folder):
        if covered > set(inside):  # a strict superset, or two processes would remove each other's shard
            with suppress(OSError):  # Windows keeps a file that another process has mapped
                shard.unlink()
    found = _open(_shard(folder, names))
    return found[1] if found is not None and found[0] == list(names) else rows
