"""The bank: whole after any kill, and refused when made another way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from hyperdreambooth.files import InputError, load_tensors
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.basis import seeded_basis
from hyperdreambooth.lidb.file import check_fits
from hyperdreambooth.lidb.weights import start
from hyperdreambooth.storage import Store

LAYOUT = small.layout()
START = start(LAYOUT, 0)


def manifest(**changes: Any) -> dict[str, Any]:
    config = {"steps": 300, "lr": 0.001, "betas": (0.9, 0.99)}
    facts = {
        "layout": LAYOUT.to_json(),
        "base_fingerprint": small.BASE,
        "basis_source": "seed:0",
        "config": config,
    }
    return {**facts, "trigger": "sks", "base_source": "some/base", **changes}


def filled(folder: Path) -> Bank:
    bank = Bank.create(folder, manifest(), START)
    bank.append(["cleo", "ana"], small.numbers(LAYOUT, 2, 1), {"loss": [0.5, 0.25]})
    bank.append(["bob"], small.numbers(LAYOUT, 1, 2), {"loss": [0.125]})
    return bank


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("[!.]*"))


def content(folder: Path) -> dict[str, bytes]:
    """All files except those that hidden names mark as unfinished."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()
    }


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    bank = Bank.open(tmp_path / "bank")
    first, second = small.numbers(LAYOUT, 2, 1), small.numbers(LAYOUT, 1, 2)
    assert (
        bank.identities == ["ana", "bob", "cleo"] and len(bank) == 3 and "bob" in bank and "eve" not in bank
    )
    assert torch.equal(bank.numbers(), torch.stack([first[1], second[0], first[0]]))
    assert torch.equal(bank.numbers(["bob", "ana", "bob"]), torch.stack([second[0], first[1], second[0]]))
    assert bank.numbers([]).shape == (0, LAYOUT.size)
    shards = [load_tensors(path) for path in shards_of(tmp_path / "bank")]
    figures = {facts["identities"]: tensors["figure.loss"].tolist() for tensors, facts in shards}
    assert figures == {'["cleo", "ana"]': [0.5, 0.25], '["bob"]': [0.125]}
    assert (
        torch.equal(bank.start, START) and bank.layout == LAYOUT and bank.manifest["config"]["steps"] == 300
    )


def test_an_identity_of_the_bank_is_a_person(tmp_path: Path) -> None:
    bank, basis = filled(tmp_path / "bank"), seeded_basis(LAYOUT.sites, 8, 5, 0)
    lidb = bank.lidb("bob", basis)
    assert torch.equal(lidb.numbers, small.numbers(LAYOUT, 1, 2)[0]) and lidb.trigger == "sks"
    check_fits(lidb, small.BASE, small.SITES, basis)
    with pytest.raises(InputError, match="over basis seed:0, got basis seed:1"):
        bank.lidb("bob", seeded_basis(LAYOUT.sites, 8, 5, 1))


def test_a_new_bank_is_empty(tmp_path: Path) -> None:
    bank = Bank.create(tmp_path / "bank", manifest(), START)
    assert bank.identities == [] and bank.numbers().shape == (0, LAYOUT.size)


def test_the_same_command_opens_the_same_bank(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    again = Bank.create(
        tmp_path / "bank", manifest(base_source="moved/base", environment={"torch": "9"}), START
    )
    assert len(again) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"config": {"steps": 300, "lr": 0.01, "betas": (0.9, 0.99)}},
            r"config\.lr: 0\.001 there, 0\.01 here",
        ),
        ({"base_fingerprint": "f" * 16}, f'base_fingerprint: "{small.BASE}" there, "{"f" * 16}" here'),
        (
            {"layout": small.layout(rank=2).to_json(), "more": 1},
            r"layout\.rank: 1 there, 2 here; more: null there, 1 here",
        ),
    ],
)
def test_a_bank_made_another_way_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    filled(tmp_path / "bank")
    with pytest.raises(InputError, match=words):
        Bank.create(tmp_path / "bank", manifest(**changes), START)


def test_another_start_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    with pytest.raises(InputError, match="another starting point"):
        Bank.create(tmp_path / "bank", manifest(), start(LAYOUT, 1))


def test_a_manifest_needs_its_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks base_fingerprint"):
        Bank.create(tmp_path / "bank", {"layout": LAYOUT.to_json(), "basis_source": "seed:0"}, START)


def test_an_unknown_identity_gets_the_closest_names(tmp_path: Path) -> None:
    bank = filled(tmp_path / "bank")
    with pytest.raises(InputError, match=r"no identity 'anna'.*did you mean ana"):
        bank.numbers(["anna"])
    with pytest.raises(InputError, match=r"it holds 3, e\.g\."):
        bank.numbers(["xyz-123"])


class Killed(BaseException):
    """Stands for kill -9: nobody catches it."""


def killed_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Kills before the n-th change of the folder: a file that appears or one that is deleted."""
    count = 0
    for name in ("write", "delete"):
        real = getattr(Store, name)

        def instead(*words: Any, real: Any = real) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return real(*words)

        patch.setattr(Store, name, instead)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_in_the_middle_of_an_append(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the shard, before the index, before older index files go: all of the group or nobody."""
    bank = filled(tmp_path / "bank")
    dan = torch.full((1, LAYOUT.size), 7.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(number, patch)
        bank.append(["dan"], dan)
    again = Bank.create(tmp_path / "bank", manifest(), START)
    assert again.identities == ["ana", "bob", "cleo", *(["dan"] if number == 3 else [])]
    assert len(shards_of(tmp_path / "bank")) == (2 if number == 1 else 3)
    if "dan" not in again:  # the run again makes the same shard
        again.append(["dan"], dan)
    again.append(["eve"], torch.full((1, LAYOUT.size), 3.0))
    again.compact()
    reopened = Bank.open(tmp_path / "bank")
    assert reopened.identities == ["ana", "bob", "cleo", "dan", "eve"]
    assert (reopened.numbers(["dan", "eve"])[:, 0].tolist()) == [7, 3]

    whole = filled(tmp_path / "whole")
    whole.append(["dan"], dan)
    whole.append(["eve"], torch.full((1, LAYOUT.size), 3.0))
    whole.compact()
    assert content(tmp_path / "whole") == content(tmp_path / "bank")


def test_a_half_written_file_goes_when_nobody_can_be_writing_it(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    old, new = (tmp_path / "bank" / "shards" / f".{k}.abc.tmp.safetensors" for k in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert len(Bank.create(tmp_path / "bank", manifest(), START)) == 3
    assert not old.exists() and new.exists()


def test_killed_while_being_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(2, patch)
        Bank.create(tmp_path / "bank", manifest(), start(LAYOUT, 1))
    with pytest.raises(InputError, match="expected a bank"):
        Bank.open(tmp_path / "bank")
    assert torch.equal(Bank.create(tmp_path / "bank", manifest(), START).start, START)


def test_what_cannot_be_appended(tmp_path: Path) -> None:
    bank = filled(tmp_path / "bank")
    good = small.numbers(LAYOUT, 2)
    broken = good.clone()
    broken[1, 5] = float("nan")
    with pytest.raises(InputError, match="training of eve diverged"):
        bank.append(["dan", "eve"], broken)
    with pytest.raises(InputError, match="training of dan diverged"):
        bank.append(["dan", "eve"], good, {"loss": [float("inf"), 1.0]})
    with pytest.raises(ValueError, match="expected numbers"):
        bank.append(["dan"], good)
    for names in (["dan", "dan"], ["dan", "bob"]):
        with pytest.raises(ValueError, match="once"):
            bank.append(names, good)
    with pytest.raises(ValueError, match="one number"):
        bank.append(["dan", "eve"], good, {"loss": [1.0]})
    assert Bank.open(tmp_path / "bank").identities == ["ana", "bob", "cleo"]


def damage(folder: Path, pattern: str, text: str | None) -> None:
    path = sorted(folder.glob(pattern))[-1]
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


@pytest.mark.parametrize(
    ("pattern", "text", "words"),
    [
        ("manifest.json", None, "expected a bank"),
        ("manifest.json", "{}", "no readable layout"),
        ("manifest.json", "[1]", "no readable layout"),
        ("manifest.json", "{", "expected a JSON file"),
        ("start.safetensors", None, "no such file"),
        ("start.safetensors", "rubbish", "not a whole safetensors file"),
        ("index/*", "rubbish", "does not fit its name"),
        ("shards/*", None, "no such file"),
        ("shards/*", "rubbish", "too short"),
    ],
)
def test_a_damaged_bank_is_one_clear_line(tmp_path: Path, pattern: str, text: str | None, words: str) -> None:
    filled(tmp_path / "bank")
    damage(tmp_path / "bank", pattern, text)
    with pytest.raises(InputError, match=words) as error:
        Bank.open(tmp_path / "bank").numbers()
    assert "bank" in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    for path in shards_of(tmp_path / "bank"):
        path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(InputError, match="NaN"):
        Bank.open(tmp_path / "bank").numbers()


def test_a_bank_of_an_older_version_is_refused(tmp_path: Path) -> None:
    """Its people would be missed without a word."""
    filled(tmp_path / "bank")
    facts = json.loads((tmp_path / "bank/manifest.json").read_text())
    (tmp_path / "bank/manifest.json").write_text(json.dumps({**facts, "format": 1}))
    for opened in (Bank.open, lambda folder: Bank.create(folder, manifest(), START)):
        with pytest.raises(InputError, match="older version; make the bank again"):
            opened(tmp_path / "bank")


def test_rows_come_in_any_order_and_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of rows, rows twice, rows of several shards and index files: always those of a plain dict."""
    monkeypatch.setattr("hyperdreambooth.lidb.bank._TOGETHER", 7 * 4 * LAYOUT.size)
    bank, known = Bank.create(tmp_path / "bank", manifest(), START), dict[str, torch.Tensor]()
    for group in range(9):
        names, rows = [f"ü{group}-{k}" for k in range(group + 1)], small.numbers(LAYOUT, group + 1, group)
        bank.append(names, rows)
        known |= dict(zip(names, rows, strict=True))
    names = [sorted(known)[(7 * k * k) % len(known)] for k in range(100)]
    wanted = torch.stack([known[name] for name in names])
    for one in (bank, Bank.open(tmp_path / "bank")):
        assert torch.equal(one.numbers(names), wanted)
        assert torch.equal(torch.cat([*one.blocks(names, 13)]), wanted)
        assert torch.equal(one.numbers(), torch.stack([known[name] for name in sorted(known)]))
    assert len([*(tmp_path / "bank" / "index").iterdir()]) <= 5  # not nine: a writer merges its own


def test_a_start_of_other_size_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    facts = json.loads((tmp_path / "bank/manifest.json").read_text())
    facts["layout"]["rank"] = 2
    (tmp_path / "bank/manifest.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="as in the manifest"):
        Bank.open(tmp_path / "bank")
