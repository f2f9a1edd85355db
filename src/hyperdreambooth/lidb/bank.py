"""A bank: the pre-optimised numbers of many people, on a disk or in an object store, whole after any kill.

`manifest.json`, which is written last, and `start.safetensors` say how the numbers were made. The numbers are
in `shards/`, one file for each call of `append`, and the files in `index/` say who is where (index.py). Both
are named by their content and never change, so any number of processes may append to a bank at once, without
a lock: the index of the bank is the union of all index files. A shard is written before its index, so whoever
is in the index can be read. A shard that no index names is left over from a kill and does no harm.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hyperdreambooth.files import InputError, discard
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.index import Array, Index, empty, index_of, merged
from hyperdreambooth.lidb.weights import Layout
from hyperdreambooth.storage import Store, digest

FORMAT = 2
_REQUIRED = ("layout", "base_fingerprint", "basis_source")
_INFORMATION = ("base_source", "environment")  # may differ between runs that make the same bank
_OLD = 24 * 3600.0  # seconds; a half-written file of that age belongs to no running process
_TOGETHER = 2**25  # bytes of rows that are read at a time
Figures: TypeAlias = Mapping[str, Sequence[float] | Tensor]
_NO_FIGURES: Figures = {}


class Bank:
    """The numbers of many identities; open a bank with `Bank.open` or `Bank.create`.

    Its `layout` has the places of each site's numbers, `start` the point `(P,)` that every identity started
    from, and `manifest` both fingerprints, config and whatever else its maker recorded. `store` is the place.
    A bank knows who was in it when it was opened or refreshed, and whom it added itself.
    """

    def __init__(self, store: Store, manifest: dict[str, Any], start: Tensor) -> None:
        self.store, self.manifest, self.start = store, manifest, start
        self.layout = Layout.from_json(manifest["layout"])
        self._shards, self._index = store / "shards", store / "index"
        self.refresh()

    @staticmethod
    def open(folder: str | Path | Store) -> Bank:
        """Opens a bank, the `out` of `preoptimize`; files that do not belong together are refused."""
        store = Store(folder)
        manifest = _manifest(store)
        try:
            size = Layout.from_json(manifest["layout"]).size
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{store}: manifest.json has no readable layout ({error!r}); make the bank again"
            ) from None
        if manifest.get("format") != FORMAT:
            raise InputError(f"{store}: a bank in the format of an older version; make the bank again")
        start = _tensors(store, "start.safetensors").get("start", torch.empty(0))
        if tuple(start.shape) != (size,):
            raise InputError(
                f"{store}: expected a start of ({size},) as in the manifest, got {tuple(start.shape)}; make "
                "the bank again"
            )
        return Bank(store, manifest, start)

    @staticmethod
    def create(folder: str | Path | Store, manifest: Mapping[str, Any], start: Tensor) -> Bank:
        """Makes a bank, or opens the existing one if it was made in the same way, so the same call resumes.

        The manifest is plain data with at least `layout` (of `Layout.to_json`), `base_fingerprint` and
        `basis_source`. A bank of another manifest or start is refused.
        """
        if missing := [key for key in _REQUIRED if key not in manifest]:
            raise ValueError(f"the manifest lacks {', '.join(missing)}")
        store, facts = Store(folder), {**manifest, "format": FORMAT}
        wanted: dict[str, Any] = json.loads(json.dumps(facts))  # as it is read back: without tuples
        if not store.exists("manifest.json"):
            store.write("start.safetensors", _packed({"start": start.detach().cpu().float()}))
            store.write("manifest.json", json.dumps(wanted, indent=2).encode())
        bank = Bank.open(store)
        _refuse_other(bank, wanted, start)
        _clear(store)
        return bank

    @property
    def folder(self) -> Path:
        """The bank's folder on this machine's disks.

        Raises:
            InputError: the bank is in an object store.
        """
        if self.store.local is None:
            raise InputError(f"{self.store}: expected a bank on a disk; copy it to one")
        return self.store.local

    @property
    def identities(self) -> list[str]:
        """All names, sorted, so that their order does not depend on how they were grouped."""
        return sorted(name for index in self._indexes for name in index.names())

    def __len__(self) -> int:
        return sum(map(len, self._indexes))

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and any(index.find([identity])[0] >= 0 for index in self._indexes)

    def refresh(self) -> None:
        """Reads the index again, and so finds whom other processes have added."""
        self._indexes, self._mine = [_read_index(self._index)[0]], list[str]()

    def compact(self) -> None:
        """Makes one file of all index files, whoever wrote them; others may append meanwhile.

        The same people in the same groups give the same files, however many processes wrote them.
        """
        index, names = _read_index(self._index)
        if len(names) > 1:
            one = self._index.add(index.to_bytes())
            self._index.delete([name for name in names if name != one])  # all that they say is in the one
        self._indexes, self._mine = [index], []

    def append(self, ids: Sequence[str], numbers: Tensor, figures: Figures = _NO_FIGURES) -> None:
        """Adds new identities: one shard with their numbers `(n, P)` and `n` figures each, then the index.

        Whoever was added when this returns is in the bank for good.
        """
        rows = numbers.detach().to("cpu", torch.float32)
        if tuple(rows.shape) != (len(ids), self.layout.size) or not ids:
            raise ValueError(f"expected numbers ({len(ids)}, {self.layout.size}), got {tuple(rows.shape)}")
        if len(set(ids)) < len(ids) or any((index.find(ids) >= 0).any() for index in self._indexes):
            raise ValueError("an identity can be added to a bank only once")
        columns = {f"figure.{key}": torch.as_tensor(c, dtype=torch.float64) for key, c in figures.items()}
        if any(tuple(column.shape) != (len(ids),) for column in columns.values()):
            raise ValueError("every figure needs one number for each identity")
        everything = torch.cat([rows.double(), *(column[:, None] for column in columns.values())], dim=1)
        if bad := [name for name, row in zip(ids, everything, strict=True) if not row.isfinite().all()]:
            names = ", ".join(bad[:5])
            raise InputError(f"{self.store}: the training of {names} diverged; lower the learning rate")
        content = _packed({"numbers": rows, **columns}, {"identities": json.dumps(list(ids))})
        self._shards.add(content)
        self._extend(index_of(ids, digest(content), _offset(content)))

    def _extend(self, index: Index) -> None:
        """Adds an index file, which takes the place of this writer's own ones that are not twice as large.

        So a writer has one file for each bit of a count, and writes each entry as often at most.
        """
        parts, replaced = [index], list[str]()
        while self._mine and len(self._indexes[-1]) < 2 * sum(map(len, parts)):
            parts.append(self._indexes.pop())
            replaced.append(self._mine.pop())
        whole = merged(parts)
        self._mine.append(self._index.add(whole.to_bytes()))
        self._indexes.append(whole)
        self._index.delete(replaced)

    def numbers(self, ids: Sequence[str] | None = None) -> Tensor:
        """Returns the numbers `(n, P)` of some identities, or of all in the order of `identities`.

        Only their rows are read, from a disk or by ranges from an object store.
        """
        names = self.identities if ids is None else ids
        found = torch.empty(len(names), self.layout.size)
        size = max(1, _TOGETHER // (4 * self.layout.size))
        for at in range(0, len(names), size):
            found[at : at + size] = self._rows(names[at : at + size])
        return found

    def blocks(self, ids: Sequence[str], size: int = 256) -> Iterator[Tensor]:
        """Yields the numbers `(size, P)` of some identities, the last block smaller, without holding all."""
        for at in range(0, len(ids), size):
            yield self.numbers(ids[at : at + size])

    def lidb(self, identity: str, basis: Basis) -> Lidb:
        """Returns one identity as a LiDB of its own, over the bases that the manifest names."""
        if basis.source != (source := self.manifest["basis_source"]):
            raise InputError(
                f"{self.store}: made over basis {source}, got basis {basis.source}; pass that one"
            )
        base, known = self.manifest["base_fingerprint"], self.manifest.get
        return Lidb(
            self.numbers([identity])[0], self.layout, basis.source, basis_fingerprint(basis), base,
            known("trigger", ""), known("base_source", ""), known("resolution"),
        )  # fmt: skip

    def _rows(self, names: Sequence[str]) -> Tensor:
        """Reads the rows of some names; rows that follow each other in a shard are one piece."""
        shards, offsets, place, row = self._places(names)
        width = 4 * self.layout.size
        wanted, back = np.unique(place * 2**32 + row, return_inverse=True)  # by shard, then by row
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        pieces = [
            (shards[at], int(offsets[at]) + width * first, width * len(run))
            for run in runs
            if len(run)
            for at, first in [divmod(int(run[0]), 2**32)]
        ]
        try:
            read = self._shards.pieces(pieces)
        except FileNotFoundError as error:
            raise InputError(f"{self.store}: no such file ({error}); make the bank again") from None
        for (shard, _, length), content in zip(pieces, read, strict=True):
            if len(content) != length:
                raise InputError(f"{self._shards}: {shard} is damaged (too short); make the bank again")
        found = torch.frombuffer(bytearray(b"".join(read)), dtype=torch.float32).view(-1, self.layout.size)
        if not found.isfinite().all():
            raise InputError(f"{self.store}: a shard holds NaN or infinite numbers; make the bank again")
        return found[torch.from_numpy(back)]

    def _places(self, names: Sequence[str]) -> tuple[list[str], Array, Array, Array]:
        """Returns the names and offsets of shards, and for each name its place among them and its row."""
        place, row = np.full(len(names), -1), np.zeros(len(names), "int64")
        shards: list[str] = []
        offsets: list[Array] = []
        for index in self._indexes:
            entries = index.find(names)
            here = entries >= 0
            used, shard = np.unique(index.shard[entries[here]], return_inverse=True)
            place[here], row[here] = shard + len(shards), index.row[entries[here]]
            shards += [f"{index.digests[k].tobytes().hex()}.safetensors" for k in used]
            offsets.append(index.offsets[used])
        if (unknown := np.flatnonzero(place < 0)).size:
            raise InputError(f"{self.store}: {self._unknown(names[int(unknown[0])])}")
        return shards, np.concatenate(offsets), place, row

    def _unknown(self, name: str) -> str:
        """Says that nobody has this name, and which names are like it."""
        some = sorted(islice((name for index in self._indexes for name in index.names()), 20_000))
        close = difflib.get_close_matches(name, some, n=3)
        holds = f"it holds {len(self)}, e.g. {some[:3]}"
        return f"no identity {name!r} in this bank; " + (
            f"did you mean {', '.join(close)}?" if close else holds
        )


def _manifest(store: Store) -> dict[str, Any]:
    """Reads a bank's manifest."""
    try:
        return json.loads(store.read("manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{store}: expected a bank, found no manifest.json; make one with hdb preoptimize"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{store}: expected a JSON file in manifest.json ({error})") from None


def _tensors(store: Store, name: str) -> dict[str, Tensor]:
    """Reads a small safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(store.read(name))
    except FileNotFoundError:
        raise InputError(f"{store}: no such file: {name}; make the bank again") from None
    except SafetensorError as error:
        raise InputError(f"{store}: {name} is not a whole safetensors file ({error})") from None


def _packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns a safetensors file; the same tensors and one entry of metadata give the same bytes."""
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {}) or None)


def _offset(content: bytes) -> int:
    """Returns where the numbers begin in the bytes of a shard."""
    size = int.from_bytes(content[:8], "little")
    return 8 + size + int(json.loads(content[8 : 8 + size])["numbers"]["data_offsets"][0])


def _read_index(store: Store) -> tuple[Index, list[str]]:
    """Returns the union of all index files, and their names."""
    for _ in range(100):  # a file may vanish between the list and the reading, but then a larger one is there
        names = store.names(".safetensors")
        with suppress(FileNotFoundError):
            contents = store.pieces([(name, 0, -1) for name in names])
            parts = [_index(store, *one) for one in zip(names, contents, strict=True)]
            return parts[0] if len(parts) == 1 else merged(parts) if parts else empty(), names
    raise InputError(f"{store}: the index changes faster than it can be read; run the command again")


def _index(store: Store, name: str, content: bytes) -> Index:
    """Reads one index file, which must hold what its name says."""
    try:
        if name != f"{digest(content).hex()}.safetensors":
            raise ValueError("its content does not fit its name")
        return Index.from_bytes(content)
    except ValueError as error:
        raise InputError(f"{store}: {name} is damaged ({error}); make the bank again") from None


def _clear(store: Store) -> None:
    """Deletes the half-written files that a killed process left long ago; others may write at this moment."""
    for left in store.local.rglob(".*.tmp*.safetensors") if store.local else ():
        with suppress(OSError):
            if left.is_file() and time.time() - left.stat().st_mtime > _OLD:
                discard(left)


def _refuse_other(bank: Bank, wanted: Mapping[str, Any], start: Tensor) -> None:
    """Refuses to append to a bank that was made in another way: its people would be of two kinds."""
    there, here = _flat(bank.manifest), _flat(wanted)
    differing = [
        f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and key.split(".")[0] not in _INFORMATION
    ]
    if differing:
        changes = "; ".join(differing)
        raise InputError(
            f"{bank.store}: holds a bank made another way ({changes}); use another --out or delete it"
        )
    if not torch.equal(bank.start, start.detach().cpu().float()):
        raise InputError(
            f"{bank.store}: holds a bank of another starting point; use another --out or delete it"
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested data with keys joined by dots, so that a message can name exactly what differs."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    """Returns a value as JSON of at most 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
