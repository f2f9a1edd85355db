"""Losses against dense oracles, and bad settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.loss import bank_scale, size_loss, weight_loss
from hyperdreambooth.lidb.basis import seeded_basis
from hyperdreambooth.lidb.weights import Layout, factors
from hyperdreambooth.shapes import Site

SITES = (Site("text_encoder.q_proj", 5, 9), Site("unet.a.to_q", 16, 3), Site("unet.b.to_k", 8, 8))


@given(rank=st.integers(1, 3), people=st.integers(1, 4), down=st.integers(1, 9), up=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_weight_loss_is_the_distance_of_the_full_matrices(rank: int, people: int, down: int, up: int) -> None:
    layout, basis = Layout(SITES, rank, down, up), seeded_basis(SITES, down, up, 3)
    ours, theirs = torch.randn(2, people, layout.size)
    scale = torch.rand(len(SITES)) + 0.5
    a, b = factors(layout, basis, ours), factors(layout, basis, theirs)
    dense = [(a[s.name][1] @ a[s.name][0] - b[s.name][1] @ b[s.name][0]).square().sum((1, 2)) for s in SITES]
    expected = (torch.stack(dense, 1) / scale).mean(1)
    torch.testing.assert_close(weight_loss(layout, ours, theirs, scale), expected, rtol=1e-4, atol=1e-4)


def test_small_distances_do_not_cancel() -> None:
    layout = Layout(SITES, 1, 5, 5)
    numbers = torch.randn(1, layout.size)
    near = numbers + 1e-4 * torch.randn(1, layout.size)
    scale = torch.ones(len(SITES))
    exact = weight_loss(layout, near.double().float(), numbers, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_loss(layout, near, numbers, scale), exact)
    assert exact > 0


def test_predicting_the_mean_of_delta_costs_one_whatever_the_scale() -> None:
    layout = Layout(SITES, 2, 6, 6)
    people = torch.randn(40, layout.size) * 1e-2
    scale = bank_scale(layout, people.split(7))
    torch.testing.assert_close(scale, bank_scale(layout, [people]))
    pairs = torch.stack([weight_loss(layout, people, people.roll(k, 0), scale) for k in range(1, 40)])
    # two people differ by twice the variance, n / (n - 1) because none is compared with itself
    torch.testing.assert_close(pairs.mean(), torch.tensor(2.0 * 40 / 39), rtol=1e-3, atol=1e-3)


def test_a_bank_of_one_is_measured_by_its_size() -> None:
    layout = Layout(SITES, 1, 6, 6)
    one = torch.randn(1, layout.size)
    zero = weight_loss(layout, torch.zeros_like(one), one, bank_scale(layout, [one]))
    torch.testing.assert_close(zero, torch.ones(1), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="without people"):
        bank_scale(layout, [])


def test_the_size_loss_is_in_units_of_the_spread() -> None:
    mean, spread = torch.randn(10), torch.rand(10) + 0.1
    theta = torch.randn(3, 10)
    torch.testing.assert_close(size_loss(mean + spread * theta, mean, spread), theta.square().mean(1))


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": [(5, 1.0), (6, 2.0)]},
        {"beta": -1.0},
        {"width": 10, "heads": 4},
        {"prompts": ()},
        {"x": 1},
    ],
)
def test_bad_settings_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        HypernetConfig.model_validate(fields)
