"""A bank: pre-optimised numbers of many people, appended group by group, whole after any kill.

`manifest.json` (written last on creation: a folder is a bank once it has one) and `start.safetensors` say how
the numbers were made; `shard-00000.safetensors`, … hold them; `index.json` maps identity → [shard, row] and
is replaced after its shard is whole. A shard without an entry is debris of a kill: never read, overwritten by
the next append.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
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
    """Numbers of many identities; open one with `Bank.open` or `Bank.create`.

    Attributes:
        folder: where it lies.
        manifest: config, `layout`, `base_fingerprint`, `basis_source` and what else the maker wrote down.
        layout: where each site's numbers lie.
        start: `(P,)`, the one point every identity started from.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], start: Tensor, index: Index) -> None:
        self.folder, self.manifest, self.start = folder, manifest, start
        self.layout = Layout.from_json(manifest["layout"])
        self._index = index
        self._shards: dict[int, dict[str, Tensor]] = {}

    @staticmethod
    def open(folder: Path) -> Bank:
        """Opens a bank for reading or appending.

        Raises:
            InputError: not a bank, or one whose files do not belong together.
        """
        if not (folder / "manifest.json").is_file():
            raise InputError(
                f"{folder}: expected a bank, found no manifest.json; make one with hdb preoptimize"
            )
        manifest = read_json(folder / "manifest.json")
        try:
            size = Layout.from_json(manifest["layout"]).size
        except (KeyError, TypeError, ValueError) as error:
            where = folder / "manifest.json"
            raise InputError(f"{where}: no readable layout ({error!r}); make the bank again") from None
        start = load_tensors(folder / "start.safetensors")[0].get("start", torch.empty(0))
        if tuple(start.shape) != (size,):
            where = folder / "start.safetensors"
            raise InputError(f"{where}: {tuple(start.shape)} numbers, the manifest says ({size},)")
        return Bank(folder, manifest, start, _read_index(folder / "index.json"))

    @staticmethod
    def create(folder: Path, manifest: Mapping[str, Any], start: Tensor) -> Bank:
        """Makes a bank, or opens the one there if it was made in just this way: resuming = the same command.

        Args:
            folder: where it lies or will lie.
            manifest: plain data with at least `layout` (of `Layout.to_json`), `base_fingerprint` and
                `basis_source`.
            start: `(P,)`.

        Raises:
            InputError: a bank of another manifest or start is there; the message names the differing keys.
        """
        if missing := [key for key in _REQUIRED if key not in manifest]:
            raise ValueError(f"the manifest lacks {', '.join(missing)}")
        # as it will be read back: tuples become lists
        wanted: dict[str, Any] = json.loads(json.dumps(dict(manifest)))
        if (folder / "manifest.json").is_file():
            bank = Bank.open(folder)
            _refuse_other(bank, wanted, start)
        else:
            save_tensors(folder / "start.safetensors", {"start": start.detach().float()})
            write_json(folder / "manifest.json", wanted)
            bank = Bank.open(folder)
        for debris in folder.glob(".*.tmp*"):  # half-written files of a killed run
            if debris.is_file():
                debris.unlink(missing_ok=True)
        return bank

    @property
    def identities(self) -> list[str]:
        """All names, sorted, so the order does not depend on how they were grouped."""
        return sorted(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, identity: object) -> bool:
        return identity in self._index

    def append(self, ids: Sequence[str], numbers: Tensor, figures: Figures = _NO_FIGURES) -> None:
        """Adds a group of finished identities: one shard, then the index, each whole.

        Args:
            ids: names, new to the bank.
            numbers: `(n, P)`.
            figures: name → one finite figure an identity, for example the last loss.

        Raises:
            InputError: an identity's numbers are NaN or infinite.
            ValueError: wrong shapes, or a name that is there already.
        """
        rows = numbers.detach().to("cpu", torch.float32)
        if tuple(rows.shape) != (len(ids), self.layout.size) or not ids:
            raise ValueError(f"numbers ({len(ids)}, {self.layout.size}) expected, got {tuple(rows.shape)}")
        if len(set(ids)) < len(ids) or any(name in self._index for name in ids):
            raise ValueError("an identity can be added to a bank once")
        if bad := [name for name, row in zip(ids, rows, strict=True) if not row.isfinite().all()]:
            told = ", ".join(bad[:5])
            raise InputError(f"{self.folder}: training of {told} diverged; lower the learning rate")
        columns = _figure_columns(figures, len(ids))
        shard = max((shard for shard, _ in self._index.values()), default=-1) + 1
        save_tensors(self._shard_path(shard), {"numbers": rows, **columns})
        index = {**self._index, **{name: (shard, row) for row, name in enumerate(ids)}}
        write_json(self.folder / "index.json", index)
        self._index = index

    def numbers(self, ids: Sequence[str] | None = None) -> Tensor:
        """The numbers of some identities, or of all in the order of `identities`: `(n, P)` float32.

        Raises:
            InputError: an unknown identity (with the closest names), or a damaged shard.
        """
        return self._gather(ids, "numbers", (self.layout.size,))

    def figure(self, key: str, ids: Sequence[str] | None = None) -> Tensor:
        """One figure of some identities, or of all: `(n,)` float64."""
        return self._gather(ids, f"figure.{key}", ())

    def lidb(self, identity: str, basis: Basis) -> Lidb:
        """One identity as a person of its own, ready to be saved or worn.

        Args:
            identity: a name in the bank.
            basis: the bases named by the manifest's `basis_source`.

        Raises:
            InputError: an unknown identity, or bases of another source.
        """
        if basis.source != self.manifest["basis_source"]:
            source = self.manifest["basis_source"]
            raise InputError(f"{self.folder}: made over basis {source}, not {basis.source}")
        base, facts = self.manifest["base_fingerprint"], self.manifest.get
        return Lidb(
            self.numbers([identity])[0], self.layout, basis.source, basis_fingerprint(basis), base,
            facts("trigger", ""), facts("base_source", ""),
        )  # fmt: skip

    def mean(self) -> Tensor:
        """The average identity, `(P,)`."""
        total = torch.zeros(self.layout.size, dtype=torch.float64)
        for rows in self._by_shard():
            total += rows.double().sum(0)
        return (total / len(self)).float()

    def spread(self) -> Tensor:
        """How far identities lie from the mean, root mean square a site, repeated to `(P,)` (training.md 2).

        One figure a site, not one a number: numbers that hardly vary must not be blown up to matter like the
        others. Zero where no identity differs, as in a bank of one.
        """
        mean, squares = self.mean().double(), torch.zeros(self.layout.size, dtype=torch.float64)
        for rows in self._by_shard():
            squares += (rows.double() - mean).square().sum(0)
        sizes = self.layout.sizes
        sites = torch.stack([chunk.mean() for chunk in squares.split(sizes)]) / len(self)
        return sites.sqrt().repeat_interleave(torch.tensor(sizes)).float()

    def _by_shard(self) -> Iterator[Tensor]:
        """All numbers, a shard at a time: statistics never hold a second copy of the bank."""
        if not self._index:
            raise InputError(f"{self.folder}: holds no identities yet; let hdb preoptimize finish a group")
        by_place = sorted(self._index, key=lambda name: self._index[name])
        for _, names in groupby(by_place, key=lambda name: self._index[name][0]):
            yield self.numbers(list(names))

    def _gather(self, ids: Sequence[str] | None, key: str, tail: tuple[int, ...]) -> Tensor:
        names = self.identities if ids is None else list(ids)
        rows: list[Tensor] = []
        for name in names:
            if name not in self._index:
                raise InputError(self._unknown(name))
            shard, row = self._index[name]
            column = self._shard(shard).get(key)
            if column is None or tuple(column.shape[1:]) != tail or row >= len(column):
                place = self._shard_path(shard)
                raise InputError(f"{place}: no row {row} of {key} {tail} for {name}; the shard is damaged")
            rows.append(column[row])
        return torch.stack(rows) if rows else torch.empty(0, *tail)

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            self._shards[number] = load_tensors(self._shard_path(number))[0]
        return self._shards[number]

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.identities, n=3)
        some = f"it holds {len(self)}, e.g. {self.identities[:3]}"
        hint = f"did you mean {', '.join(close)}?" if close else some
        return f"{self.folder}: no identity {name!r} in this bank; {hint}"


def _read_index(path: Path) -> Index:
    """Identity → (shard, row); no file yet means no identities yet."""
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


def _figure_columns(figures: Figures, n: int) -> dict[str, Tensor]:
    """Figures as a shard holds them: float64, one an identity."""
    columns = {f"figure.{key}": torch.as_tensor(c, dtype=torch.float64).cpu() for key, c in figures.items()}
    if any(tuple(column.shape) != (n,) or not column.isfinite().all() for column in columns.values()):
        raise ValueError("every figure needs one finite number an identity")
    return columns


def _refuse_other(bank: Bank, wanted: Mapping[str, Any], start: Tensor) -> None:
    """Appending to a bank made in another way would mix people of two kinds."""
    there, here = _flat(bank.manifest), _flat(wanted)
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    differing = [key for key in differing if key.split(".")[0] not in _INFORMATION]
    if differing:
        pairs = ((key, _short(there.get(key)), _short(here.get(key))) for key in differing)
        told = "; ".join(f"{key}: {old} there, {new} here" for key, old, new in pairs)
        raise InputError(
            f"{bank.folder}: holds a bank made another way ({told}); use another --out or delete it"
        )
    if not torch.equal(bank.start, start.detach().cpu().float()):
        raise InputError(
            f"{bank.folder}: holds a bank of another starting point; use another --out or delete it"
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, so that a message can name exactly what differs."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    """A value as it fits in one line."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
