"""Many processes append to one bank at once, and some are killed: nothing is lost, nobody is there twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import small
import torch

import objects
import processes
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.weights import Layout, start
from hyperdreambooth.storage import Store

LAYOUT = Layout(small.SITES[:2], 1, 4, 4)
MANIFEST = {"layout": LAYOUT.to_json(), "base_fingerprint": small.BASE, "basis_source": "seed:0"}
START = start(LAYOUT, 0)


def people(group: int) -> tuple[list[str], torch.Tensor]:
    """Three people of a group, the same whoever asks."""
    return [f"group {group} person {k}" for k in range(3)], small.numbers(LAYOUT, 3, group)


def write(place: str, said: Path, groups: list[int], die_at: int, environ: dict[str, str]) -> None:
    """Appends groups, writes down those whose append has returned, and dies at the n-th change by -9."""
    os.environ |= environ  # of the test, not of the server that forks its processes
    real, count = Store.write, 0

    def counting(self: Store, name: str, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, content)

    Store.write = counting
    bank = Bank.create(place, MANIFEST, START)
    for group in groups:
        names, numbers = people(group)
        if names[0] not in bank:  # another writer may have been faster
            bank.append(names, numbers)
        with said.open("a") as lines:
            lines.write(f"{group}\n")
    bank.compact()


GROUPS = ([0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [3, 4, 5, 6, 7], [30, 31, 32, 33, 34])
"""Of four writers: the first and the third have groups in common, the others are killed."""


def at_once(place: str, home: Path) -> tuple[set[int], list[int]]:
    """Runs the writers. Returns the groups that they said were written, and the exit codes."""
    started: list[Any] = []
    for k, groups in enumerate(GROUPS):
        words = (groups, 3 + k if k % 2 else 0, dict(os.environ))
        started.append(processes.start(write, place, home / f"said-{k}", *words))
    for process in started:
        process.join()
    said = {int(line) for file in home.glob("said-*") for line in file.read_text().splitlines()}
    return said, [process.exitcode for process in started]


def check(place: str, said: set[int]) -> None:
    """What was said is there, once, with its numbers; the rest can be added, and then all banks are equal."""
    bank = Bank.open(place)
    for group in said:
        names, numbers = people(group)
        assert torch.equal(bank.numbers(names), numbers)
    assert len(bank) == len(bank.identities) == len(set(bank.identities)) and len(bank) % 3 == 0
    assert torch.equal(bank.numbers(), torch.cat([*bank.blocks(bank.identities, 5)]))


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "bank")
    else:
        with objects.bucket("banks") as url:
            yield f"{url}/bank"


@processes.CHEAP
def test_writers_at_once_and_killed(place: str, tmp_path: Path) -> None:
    said, exits = at_once(place, tmp_path)
    assert exits == [0, -signal.SIGKILL, 0, -signal.SIGKILL]
    assert said >= {*GROUPS[0], *GROUPS[2]}
    check(place, said)

    bank = Bank.open(place)  # the same call again finishes what is missing
    for group in sorted({*chain(*GROUPS)}):
        names, numbers = people(group)
        if not set(names) <= set(bank.identities):
            bank.append(names, numbers)
    bank.compact()
    alone = Bank.create(tmp_path / "alone", MANIFEST, START)
    for group in sorted({*chain(*GROUPS)}):
        alone.append(*people(group))
    alone.compact()
    store, other = Store(place), Store(tmp_path / "alone")
    for folder in ("index", "shards"):
        assert (store / folder).names() == (other / folder).names() != []  # named by their content


def test_a_reader_sees_whom_others_add(tmp_path: Path) -> None:
    first = Bank.create(tmp_path / "bank", MANIFEST, START)
    second = Bank.open(tmp_path / "bank")
    first.append(*people(0))
    second.append(*people(1))
    assert len(first) == len(second) == 3
    first.compact()  # of what both wrote; the second's next file need not know
    second.append(*people(2))
    for bank in (first, second):
        bank.refresh()
        assert len(bank) == 9 and "group 2 person 0" in bank
    second.append(*people(3))
    second.compact()
    assert len(Store(tmp_path / "bank" / "index").names()) == 1 and len(Bank.open(tmp_path / "bank")) == 12


def test_an_index_file_that_vanishes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = Bank.create(tmp_path / "bank", MANIFEST, START), Bank.open(tmp_path / "bank")
    writer.append(*people(0))
    real = Store.pieces

    def late(self: Store, pieces: list[tuple[str, int, int]]) -> list[bytes]:
        if len(writer) == 3:  # between the list of files and their reading
            writer.append(*people(1))
        return real(self, pieces)

    monkeypatch.setattr(Store, "pieces", late)
    reader.refresh()
    assert len(reader) == 6
