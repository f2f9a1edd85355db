"""A bank of any size as targets: one pass for mean, spread and scale, and rows when a step needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eyes
from hyperdreambooth.base.load import Base
from hyperdreambooth.hypernet import target
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.loss import bank_scale
from hyperdreambooth.hypernet.target import read_targets

NAMES = tuple(f"p{k}" for k in range(9))


def test_a_bank_that_does_not_fit_into_memory_gives_the_same(
    micro_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = eyes.bank(micro_base, tmp_path / "bank", (*NAMES, "other"))
    held = read_targets(micro_base, HypernetConfig(), NAMES, [2, 5], bank)
    monkeypatch.setattr(target, "_HELD", 0)
    read = read_targets(micro_base, HypernetConfig(), NAMES, [2, 5], bank)
    trained = [name for name in bank.identities if name not in ("p2", "p5")]
    people = bank.numbers(trained).double()
    for targets in (held, read):
        assert sorted(targets.rows) == [0, 1, 3, 4, 6, 7, 8]
        assert torch.equal(targets.known([8, 0, 8]), bank.numbers(["p8", "p0", "p8"]))
        torch.testing.assert_close(targets.mean, people.mean(0).float())
        squares = (people - people.mean(0)).square().mean(0).split(bank.layout.sizes)
        spread = torch.cat([each.mean().sqrt().expand(len(each)) for each in squares]).float()
        torch.testing.assert_close(targets.spread, spread)
        torch.testing.assert_close(targets.scale, bank_scale(bank.layout, [people.float()]))
    assert held.digest == read.digest


def test_equal_people_have_the_default_spread(micro_base: Base, tmp_path: Path) -> None:
    bank = eyes.bank(micro_base, tmp_path / "bank", ("p0",))
    same = bank.numbers(["p0"])
    for k in range(1, 7):
        bank.append([f"p{k}"], same)
    targets = read_targets(micro_base, HypernetConfig(spread=0.3), NAMES, [], bank)
    assert torch.equal(targets.mean, same[0]) and (targets.spread == 0.3).all()
    other = read_targets(micro_base, HypernetConfig(spread=0.3), NAMES, [1], bank)
    assert other.digest != targets.digest
