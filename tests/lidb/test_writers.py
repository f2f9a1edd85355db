"""Many processes append to one bank at once, and some are killed: nothing is lost, nobody is there twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
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
        bank.append(*people(group))
        with said.open("a") as lines:
            lines.write(f"{group}\n")
    bank.compact()


def at_once(place: str, home: Path, writers: int, each: int) -> tuple[set[int], list[int]]:
    """Runs writers that share groups with a neighbour; every second is killed. Returns what was said."""
    started: list[Any] = []
    for k in range(writers):
        groups, die_at = [k * (each - 2) + j for j in range(each)], 3 + k if k % 2 else 0
        started.append(processes.start(write, place, home / f"said-{k}", groups, die_at, dict(os.environ)))
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
    said, exits = at_once(place, tmp_path, writers=4, each=5)
    assert sorted(exits) == [-signal.SIGKILL] * 2 + [0] * 2
    assert len(said) >= 2 * 5  # those that lived wrote all of their own
    check(place, said)

    bank = Bank.open(place)  # the same call again finishes what is missing
    for group in range(4 * 3 + 2):
        names, numbers = people(group)
        if not set(names) <= set(bank.identities):
            bank.append(names, numbers)
    bank.compact()
    alone = Bank.create(tmp_path / "alone", MANIFEST, START)
    for group in range(4 * 3 + 2):
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
