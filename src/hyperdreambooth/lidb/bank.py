"""A bank: the pre-optimised numbers of many people, appended group by group and whole after any kill.

`manifest.json`, which is written last, and `start.safetensors` say how the numbers were made. They are in
`shard-00000.safetensors`, …. `index.json` maps identity → [shard, row] and is replaced after its shard is
whole: a shard without an entry is left over from a kill, and the next append overwrites it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.files import InputError, load_tensors, read_json, save_tensors, write_json
from hyperdreambooth.lidb.basis import Basis, basis_fingerprint
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout

_REQUIRED = ("layout", "base_fingerprint", "basis_source")
_INFORMATION = ("base_source", "environment")  # may differ between runs that make the same bank
Figures: TypeAlias = Mapping[str, Sequence[float] | Tensor]
_NO_FIGURES: Figures = {}
Index: TypeAlias = dict[str, tuple[int, int]]
"""Identity → (shard, row)."""


class Bank:
    """The numbers of many identities; open a bank with `Bank.open` or `Bank.create`.

    Its `layout` has the places of each site's numbers, `start` the point `(P,)` that every identity started
    from, and `manifest` both fingerprints, config and whatever else its maker recorded.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], start: Tensor, index: Index) -> None:
        self.folder, self.manifest, self.start = folder, manifest, start
        self.layout = Layout.from_json(manifest["layout"])
        self._index = index
        self._shards: dict[int, dict[str, Tensor]] = {}

    @staticmethod
    def open(folder: str | Path) -> Bank:
        """Opens a bank, the `out` of `preoptimize`; files that do not belong together are refused."""
        folder = Path(folder)
        described, started = folder / "manifest.json", folder / "start.safetensors"
        if not described.is_file():
            raise InputError(
                f"{folder}: expected a bank, found no manifest.json; make one with hdb preoptimize"
            )
        manifest = read_json(described)
        try:
            size = Layout.from_json(manifest["layout"]).size
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{described}: no readable layout ({error!r}); make the bank again") from None
        start = load_tensors(started)[0].get("start", torch.empty(0))
        if tuple(start.shape) != (size,):
            raise InputError(
                f"{started}: expected numbers ({size},) as in the manifest, got {tuple(start.shape)}; make "
                "the bank again"
            )
        return Bank(folder, manifest, start, _read_index(folder / "index.json"))

    @staticmethod
    def create(folder: Path, manifest: Mapping[str, Any], start: Tensor) -> Bank:
        """Makes a bank, or opens the existing one if it was made in the same way, so the same call resumes.

        The manifest is plain data with at least `layout` (of `Layout.to_json`), `base_fingerprint` and
        `basis_source`. A bank of another manifest or start is refused.
        """
        if missing := [key for key in _REQUIRED if key not in manifest]:
            raise ValueError(f"the manifest lacks {', '.join(missing)}")
        wanted: dict[str, Any] = json.loads(json.dumps(dict(manifest)))  # as it is read back: without tuples
        if not (folder / "manifest.json").is_file():
            save_tensors(folder / "start.safetensors", {"start": start.detach().float()})
            write_json(folder / "manifest.json", wanted)
        bank = Bank.open(folder)
        _refuse_other(bank, wanted, start)
        for debris in folder.glob(".*.tmp*"):  # half-written files of a killed run
            if debris.is_file():
                debris.unlink(missing_ok=True)
        return bank

    @property
    def identities(self) -> list[str]:
        """All names, sorted, so that their order does not depend on how they were grouped."""
        return sorted(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, identity: object) -> bool:
        return identity in self._index

    def append(self, ids: Sequence[str], numbers: Tensor, figures: Figures = _NO_FIGURES) -> None:
        """Adds new identities: one shard with their numbers `(n, P)` and `n` figures each, then the index."""
        rows = numbers.detach().to("cpu", torch.float32)
        if tuple(rows.shape) != (len(ids), self.layout.size) or not ids:
            raise ValueError(f"expected numbers ({len(ids)}, {self.layout.size}), got {tuple(rows.shape)}")
        if len(set(ids)) < len(ids) or any(name in self._index for name in ids):
            raise ValueError("an identity can be added to a bank only once")
        columns = {f"figure.{key}": torch.as_tensor(c, dtype=torch.float64) for key, c in figures.items()}
        if any(tuple(column.shape) != (len(ids),) for column in columns.values()):
            raise ValueError("every figure needs one number for each identity")
        everything = torch.cat([rows.double(), *(column[:, None] for column in columns.values())], dim=1)
        if bad := [name for name, row in zip(ids, everything, strict=True) if not row.isfinite().all()]:
            names = ", ".join(bad[:5])
            raise InputError(f"{self.folder}: the training of {names} diverged; lower the learning rate")
        shard = max((shard for shard, _ in self._index.values()), default=-1) + 1
        save_tensors(self._shard_path(shard), {"numbers": rows, **columns})
        index = {**self._index, **{name: (shard, row) for row, name in enumerate(ids)}}
        write_json(self.folder / "index.json", index)
        self._index = index

    def numbers(self, ids: Sequence[str] | None = None) -> Tensor:
        """Returns the numbers `(n, P)` of some identities, or of all in the order of `identities`."""
        names = self.identities if ids is None else list(ids)
        rows = [self._row(name) for name in names]
        return torch.stack(rows) if rows else torch.empty(0, self.layout.size)

    def lidb(self, identity: str, basis: Basis) -> Lidb:
        """Returns one identity as a LiDB of its own, over the bases that the manifest names."""
        if basis.source != (source := self.manifest["basis_source"]):
            raise InputError(
                f"{self.folder}: made over basis {source}, got basis {basis.source}; pass that one"
            )
        base, known = self.manifest["base_fingerprint"], self.manifest.get
        return Lidb(
            self.numbers([identity])[0], self.layout, basis.source, basis_fingerprint(basis), base,
            known("trigger", ""), known("base_source", ""), known("resolution"),
        )  # fmt: skip

    def _row(self, name: str) -> Tensor:
        if name not in self._index:
            close = difflib.get_close_matches(name, self.identities, n=3)
            some = f"it holds {len(self)}, e.g. {self.identities[:3]}"
            hint = f"did you mean {', '.join(close)}?" if close else some
            raise InputError(f"{self.folder}: no identity {name!r} in this bank; {hint}")
        shard, row = self._index[name]
        place = self._shard_path(shard)
        if shard not in self._shards:
            self._shards[shard] = load_tensors(place)[0]
        found = self._shards[shard].get("numbers")
        if found is None or tuple(found.shape[1:]) != (self.layout.size,) or row >= len(found):
            raise InputError(
                f"{place}: no row {row} of numbers for {name}; the shard is damaged, make the bank again"
            )
        return found[row]

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


def _read_index(path: Path) -> Index:
    """Returns identity → (shard, row); a bank without the file has no identities yet."""
    if not path.is_file():
        return {}
    data = read_json(path)
    try:
        index = {str(name): (int(shard), int(row)) for name, (shard, row) in data.items()}
        if any(min(place) < 0 for place in index.values()):
            raise ValueError("a place below 0")
        return index
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected identity → [shard, row] ({error}); make the bank again") from None


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
            f"{bank.folder}: holds a bank made another way ({changes}); use another --out or delete it"
        )
    if not torch.equal(bank.start, start.detach().cpu().float()):
        raise InputError(
            f"{bank.folder}: holds a bank of another starting point; use another --out or delete it"
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
