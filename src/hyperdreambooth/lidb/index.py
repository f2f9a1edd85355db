"""Where the people of a bank are: arrays of fixed width, sorted by a hash of the name.

A million people take 45 bytes each and no Python object. A name's key is 128 bits of BLAKE2b, so equal keys
are equal names (2⁶⁴ names before two of them meet). Indexes are merged like sets, in any order and any
number of times: the result is the same bytes. If a person is in two shards, the smaller name counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
_KINDS = {
    "high": "uint64", "low": "uint64", "shard": "int32", "row": "int32", "ends": "int64", "text": "uint8",
    "digests": "uint8", "offsets": "int64",
}  # fmt: skip
_TOGETHER = 2**16  # names that are moved at a time


@dataclass(frozen=True)
class Index:
    """Sorted entries of `n` people in `m` shards.

    Attributes:
        high, low: the halves of each name's key, `(n,)`.
        shard, row: the place in `digests`, and the row in that shard, `(n,)`.
        ends: name `k` is `text[ends[k - 1]:ends[k]]`, `(n,)`.
        text: all names in UTF-8, `(t,)`.
        digests: the content that names each shard, sorted, `(m, 16)`.
        offsets: the first byte of each shard's numbers in its file, `(m,)`.
    """

    high: Array
    low: Array
    shard: Array
    row: Array
    ends: Array
    text: Array
    digests: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.high)

    def find(self, names: Sequence[str]) -> Array:
        """Returns the entry of each name, `(k,)`; -1 where there is none."""
        high, low = keys_of(names)
        at = np.searchsorted(self.high, high)
        while True:  # more than once only where two names share half a key
            here = np.minimum(at, max(len(self) - 1, 0))
            inside = (at < len(self)) & (self.high[here] == high if len(self) else False)
            late = inside & (self.low[here] != low if len(self) else False)
            if not late.any():
                return np.where(inside, at, -1)
            at = at + late

    def names(self, entries: Array | None = None) -> list[str]:
        """Returns the names of some entries, or of all."""
        starts = np.concatenate([[0], self.ends[:-1]]) if len(self) else self.ends
        chosen = slice(None) if entries is None else entries
        text: memoryview = self.text.data
        spans = zip(starts[chosen].tolist(), self.ends[chosen].tolist(), strict=True)
        return [str(text[start:end], "utf-8", "surrogatepass") for start, end in spans]

    def to_bytes(self) -> bytes:
        """Returns the index as a safetensors file."""
        from safetensors.numpy import save

        return save({name: np.ascontiguousarray(getattr(self, name)) for name in _KINDS})

    @staticmethod
    def from_bytes(content: bytes) -> Index:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: the arrays do not fit together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            index = Index(**load(content))
        except (SafetensorError, TypeError) as error:
            raise ValueError(str(error)) from None
        n, m = len(index.high), len(index.digests)
        lengths = {"text": int(index.ends[-1]) if n else 0, "digests": m, "offsets": m}
        for field in fields(Index):
            array = getattr(index, field.name)
            if len(array) != lengths.get(field.name, n) or array.dtype != _KINDS[field.name]:
                raise ValueError(f"{field.name} does not fit")
        if n and not (index.shard.min() >= 0 and index.shard.max() < m and index.row.min() >= 0):
            raise ValueError("a place outside the shards")
        return index


def keys_of(names: Sequence[str]) -> tuple[Array, Array]:
    """Returns the two halves `(k,)` of the names' keys."""
    encoded = (name.encode("utf-8", "surrogatepass") for name in names)
    joined = b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in encoded)
    both = np.frombuffer(joined, ">u8").astype("uint64").reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


def index_of(names: Sequence[str], digest: bytes, offset: int) -> Index:
    """Returns the index of one shard, whose rows are `names`."""
    high, low = keys_of(names)
    texts = [name.encode("utf-8", "surrogatepass") for name in names]
    ends = np.cumsum([len(text) for text in texts], dtype="int64")
    rows, content = np.arange(len(names), dtype="int32"), np.frombuffer(b"".join(texts), "uint8")
    shards = np.frombuffer(digest, "uint8")[None], np.array([offset], "int64")
    return merged([Index(high, low, np.zeros_like(rows), rows, ends, content, *shards)])


def empty() -> Index:
    """Returns the index of nobody."""
    arrays = {name: np.zeros((0, 16) if name == "digests" else 0, kind) for name, kind in _KINDS.items()}
    return Index(**arrays)


def merged(parts: Sequence[Index]) -> Index:
    """Returns one index of all people of several, each once."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return empty()
    digests, offsets, places = _shards(parts)
    high, low, row = (np.concatenate([getattr(p, name) for p in parts]) for name in ("high", "low", "row"))
    shard = np.concatenate([place[part.shard] for part, place in zip(parts, places, strict=True)])
    order = np.lexsort((row, shard, low, high))
    ordered = high[order], low[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[0][1:] != ordered[0][:-1]) | (ordered[1][1:] != ordered[1][:-1])
    kept = order[first]
    used, shard = np.unique(shard[kept], return_inverse=True)
    ends, text = _names(parts, kept)
    arrays = high[kept], low[kept], shard.astype("int32"), row[kept], ends, text
    return Index(*arrays, digests[used], offsets[used])


def _shards(parts: Sequence[Index]) -> tuple[Array, Array, list[Array]]:
    """Returns the sorted shards of all parts, their offsets, and where each part's shards are among them."""
    every = np.ascontiguousarray(np.concatenate([part.digests for part in parts]))
    _, first, place = np.unique(every.view("V16")[:, 0], return_index=True, return_inverse=True)
    offsets = np.concatenate([part.offsets for part in parts])[first]
    cuts = np.cumsum([len(part.digests) for part in parts])[:-1]
    return every[first], offsets, np.split(place, cuts)


def _names(parts: Sequence[Index], kept: Array) -> tuple[Array, Array]:
    """Returns ends and text of the kept entries of all parts one after the other."""
    text = np.concatenate([part.text for part in parts])
    lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
    starts = (np.cumsum(lengths) - lengths)[kept]
    lengths = lengths[kept]
    ends = np.cumsum(lengths, dtype="int64")
    blocks: list[Array] = []
    for at in range(0, len(kept), _TOGETHER):  # a block at a time: a place of 8 bytes for each letter
        size = lengths[at : at + _TOGETHER]
        shifts = starts[at : at + _TOGETHER] - (np.cumsum(size) - size)
        blocks.append(text[np.repeat(shifts, size) + np.arange(size.sum())])
    return ends, np.concatenate(blocks)
