"""The bank: whole after any kill, and refused when made another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from hyperdreambooth.files import InputError, load_tensors
from hyperdreambooth.lidb import bank as bank_module
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.basis import seeded_basis
from hyperdreambooth.lidb.file import check_fits
from hyperdreambooth.lidb.weights import start

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
    figures = load_tensors(tmp_path / "bank/shard-00000.safetensors")[0]["figure.loss"]
    assert torch.equal(figures, torch.tensor([0.5, 0.25], dtype=torch.float64))
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


@pytest.mark.parametrize("victim", ["save_tensors", "write_json"])
def test_killed_in_the_middle_of_an_append(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the shard or between shard and index: nobody half-visible, and the orphan is overwritten."""
    bank = filled(tmp_path / "bank")

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bank_module, victim, killed)
        with pytest.raises(Killed):
            bank.append(["dan"], torch.full((1, LAYOUT.size), 7.0))
    assert (tmp_path / "bank/shard-00002.safetensors").exists() == (victim == "write_json")
    (tmp_path / "bank/.shard-00002.abc.tmp.safetensors").write_bytes(b"half")
    assert "dan" not in bank
    again = Bank.create(tmp_path / "bank", manifest(), START)
    assert again.identities == ["ana", "bob", "cleo"] and not list((tmp_path / "bank").glob(".*"))
    again.append(["eve"], torch.full((1, LAYOUT.size), 3.0))
    reopened = Bank.open(tmp_path / "bank")
    assert reopened.identities == ["ana", "bob", "cleo", "eve"] and (reopened.numbers(["eve"]) == 3).all()
    assert len(list((tmp_path / "bank").glob("shard-*"))) == 3


def test_killed_while_being_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bank_module, "write_json", killed)
        with pytest.raises(Killed):
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


def damage(folder: Path, name: str, text: str | None) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("manifest.json", None, "expected a bank"),
        ("manifest.json", "{}", "no readable layout"),
        ("manifest.json", "[1]", "no readable layout"),
        ("manifest.json", "{", "expected a JSON file"),
        ("start.safetensors", None, "no such file"),
        ("index.json", "[]", "expected identity"),
        ("index.json", '{"ana": 3}', "expected identity"),
        ("index.json", '{"ana": [0, 9]}', "no row 9"),
        ("index.json", '{"ana": [0, -1]}', "expected identity"),
        ("shard-00000.safetensors", None, "no such file"),
        ("shard-00000.safetensors", "rubbish", "safetensors"),
    ],
)
def test_a_damaged_bank_is_one_clear_line(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    filled(tmp_path / "bank")
    damage(tmp_path / "bank", name, text)
    with pytest.raises(InputError, match=words) as error:
        Bank.open(tmp_path / "bank").numbers()
    assert "bank" in str(error.value) and "\n" not in str(error.value)


def test_a_start_of_other_size_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "bank")
    facts = json.loads((tmp_path / "bank/manifest.json").read_text())
    facts["layout"]["rank"] = 2
    (tmp_path / "bank/manifest.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="as in the manifest"):
        Bank.open(tmp_path / "bank")
