"""The index is a set of people: merged in any order and any number of times, it is the same bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperdreambooth.lidb.index import Index, empty, index_of, merged
from hyperdreambooth.storage import digest

NAMES = st.lists(st.text(max_size=5), min_size=1, max_size=6, unique=True)


def where(index: Index, name: str) -> tuple[bytes, int, int] | None:
    """The shard, the offset and the row of a name."""
    entry = int(index.find([name])[0])
    if entry < 0:
        return None
    shard = int(index.shard[entry])
    return index.digests[shard].tobytes(), int(index.offsets[shard]), int(index.row[entry])


@given(groups=st.lists(NAMES, max_size=6), seed=st.integers(0, 99))
def test_merged_in_any_order_is_the_same(groups: list[list[str]], seed: int) -> None:
    """Against a dict; people who are in several shards are in the one of the smallest name."""
    parts = [index_of(names, digest(repr(names).encode()), len(names)) for names in groups]
    known: dict[str, tuple[bytes, int, int]] = {}
    for names in sorted(groups, key=lambda names: digest(repr(names).encode()), reverse=True):
        places = [(digest(repr(names).encode()), len(names), row) for row in range(len(names))]
        known |= dict(zip(names, places, strict=True))
    whole = merged(parts)
    assert len(whole) == len(known) and set(whole.names()) == set(known)
    assert {name: where(whole, name) for name in known} == known
    assert where(whole, "nobody of six letters") is None
    draw = random.Random(seed)
    again = empty()
    for part in draw.sample(parts * 2, 2 * len(parts)):  # one by one, each twice
        again = merged(draw.sample([again, part], 2))
    assert again.to_bytes() == whole.to_bytes()
    assert Index.from_bytes(whole.to_bytes()).names() == whole.names()


def test_names_that_share_half_a_key_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"p{k}" for k in range(50)]

    def halved(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array([int(name[1:]) for name in names], "uint64")
        return numbers // 10, numbers

    monkeypatch.setattr("hyperdreambooth.lidb.index.keys_of", halved)
    index = index_of(names, bytes(16), 0)
    assert [row for name in names for *_, row in [where(index, name) or ()]] == list(range(50))
    assert index.find(["p50", "p7", "p999"]).tolist() == [-1, 7, -1]


def test_names_that_no_text_file_may_hold_survive() -> None:
    names = ["a\udcff", "", "𝄞", "\ue000", "x" * 1000]
    index = index_of(names, bytes(16), 5)
    assert sorted(index.names()) == sorted(names)
    assert index.names(index.find(names)) == names


@pytest.mark.parametrize("field", ["low", "shard", "row", "ends", "text", "offsets"])
def test_arrays_that_do_not_fit_are_refused(field: str) -> None:
    index = index_of(["ana", "bob"], bytes(16), 5)
    broken = Index(**{**vars(index), field: np.zeros(7, getattr(index, field).dtype)})
    with pytest.raises(ValueError, match=f"{field} does not fit"):
        Index.from_bytes(broken.to_bytes())
    with pytest.raises(ValueError, match="outside"):
        Index.from_bytes(Index(**{**vars(index), "shard": np.full(2, 1, "int32")}).to_bytes())
    with pytest.raises(ValueError):
        Index.from_bytes(index.to_bytes()[:-1])
