"""A cache for the outputs of frozen models, which never change for the same photo or caption.

A folder holds shards of rows, each row named by the hash of its input. Shards appear whole and never change,
so many processes may fill a folder. Its name must contain all else that rows depend on (weights, size, …).
A folder in an object store is mirrored on this machine's disk: each shard is fetched and uploaded once.
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

from hyperdreambooth.files import save_tensors, write_bytes
from hyperdreambooth.progress import Progress
from hyperdreambooth.storage import Store

Rows: TypeAlias = dict[str, Tensor]
"""Name → tensor; the first axis of all of them has the same length."""

_NAMES = "names"
BATCHES = 16  # batches in one shard: 20,000 photos make 40 files and 40 writes instead of 625


def cached_rows(
    names: Sequence[str],
    encode: Callable[[list[int]], Mapping[str, Tensor]],
    folder: Path | Store,
    batch: int = 32,
    title: str = "encode",
) -> Rows:
    """Returns the rows of `m` inputs, read from the folder or encoded and added to it.

    Rows that were encoded in several batches are merged into one shard, which the next call maps into memory.
    Many processes then share one copy, and only the rows in use are loaded.

    `names` are hashes of the inputs; a repeated one is encoded once. `encode` maps positions to their rows.
    """
    store = Store(folder)
    if (found := _fetch_exact(store, names)) is not None:
        return found
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    known = {
        name: {key: tensor[at] for key, tensor in rows.items()}
        for _, inside, rows in _shards(store)
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
                    known |= _write(store, names, waiting)
        finally:  # one broken photo must not cost the rows of the others
            known |= _write(store, names, waiting)
    merged = {key: torch.stack([known[name][key] for name in names]) for key in known[names[0]]}
    return _merge(store, names, merged) if len(places) > batch else merged


def _write(
    store: Store, names: Sequence[str], waiting: list[tuple[list[int], Mapping[str, Tensor]]]
) -> dict[str, Rows]:
    """Writes the waiting batches as one shard, empties the list, and returns name → row of every tensor."""
    if not waiting:
        return {}
    chosen = [names[place] for part, _ in waiting for place in part]
    made = {key: torch.cat([rows[key].detach().cpu() for _, rows in waiting]) for key in waiting[0][1]}
    waiting.clear()
    made = _save(store, chosen, made)
    return {name: {key: rows[at] for key, rows in made.items()} for at, name in enumerate(chosen)}


def _shard(names: Sequence[str]) -> str:
    """Returns the name of a shard, which follows from its rows' names: equal rows go to the same file."""
    return f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}.safetensors"


def _save(store: Store, names: Sequence[str], rows: Rows) -> Rows:
    """Writes a shard and returns its rows, mapped, so that they need not stay in memory."""
    shard = store.here / _shard(names)
    try:
        save_tensors(shard, rows, {_NAMES: " ".join(names)})
    except PermissionError:  # Windows does not replace a mapped file, but then it should hold the same rows
        if (_open_exact(shard, names) or {}).keys() != rows.keys():
            raise
    if store.local is None:
        store.write(shard.name, shard.read_bytes())
    return _open_exact(shard, names) or rows


def _fetch_exact(store: Store, names: Sequence[str]) -> Rows | None:
    """Returns the rows of the shard of exactly these names, from an object store if it is not here yet."""
    shard = _shard(names)
    if store.local is None and not (store.here / shard).exists() and store.exists(shard):
        _fetch(store, shard)
    return _open_exact(store.here / shard, names)


def _fetch(store: Store, shard: str) -> None:
    """Copies a shard from an object store to this machine, unless another process has just removed it."""
    with suppress(FileNotFoundError):
        write_bytes(store.here / shard, store.read(shard))


def _open_exact(shard: Path, names: Sequence[str]) -> Rows | None:
    """Returns the rows of a shard if it holds exactly these names; None if it is missing or damaged."""
    found = _open(shard)
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


def _shards(store: Store) -> Iterator[tuple[str, list[str], Rows]]:
    """Yields all readable shards in the order of their file names."""
    for shard in store.names(".safetensors"):
        if not (store.here / shard).exists():
            _fetch(store, shard)
        if opened := _open(store.here / shard):
            yield shard, *opened


def _merge(store: Store, names: Sequence[str], rows: Rows) -> Rows:
    """Writes one shard, removes those whose rows are all in it, and returns the memory-mapped rows."""
    merged = _save(store, names, rows)
    covered = set(names)
    for shard, inside, _ in _shards(Store(store.here)):
        if covered > set(inside):  # a strict superset, or two processes would remove each other's shard
            with suppress(OSError):  # Windows keeps a file that another process has mapped
                (store.here / shard).unlink()
            if store.local is None:
                store.delete([shard])
    return merged
