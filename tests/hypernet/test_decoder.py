"""The padded decoder against loops that anybody can read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperdreambooth.hypernet.decoder import HyperNetwork, NetworkShape
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.weights import Layout, factors
from hyperdreambooth.shapes import Site

SITES = (
    Site("text_encoder.q_proj", 5, 9),
    Site("unet.a.to_q", 16, 3),
    Site("unet.b.to_k", 2, 2),
    Site("unet.c.to_v", 8, 8),
)


def network(rank: int = 1, refinements: int = 2, learn_basis: bool = False, seed: int = 0) -> HyperNetwork:
    """Four odd sites, width 8, with a head large enough to see."""
    layout = Layout(SITES, rank, 6, 4)
    basis = seeded_basis(SITES, 6, 4, 0)
    made = HyperNetwork(layout, NetworkShape(3, 5, 8, 2, 2, refinements), basis, learn_basis, seed)
    with torch.no_grad():
        made.head.mul_(1e3)
        made.head_bias.normal_(generator=torch.Generator().manual_seed(1))
    features = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(2)).half()
    made.normalise(torch.linspace(-1, 1, layout.size), torch.linspace(1, 2, layout.size), features)
    return made


def naive_delta(net: HyperNetwork, seen: Tensor, overall: Tensor, theta: Tensor) -> Tensor:
    """`T(f, θ)` with a loop over sites."""
    sites = range(len(net.layout.sites))
    spans = [slice(net.layout.offsets[k], net.layout.offsets[k + 1]) for k in sites]
    tokens = [
        theta[:, spans[k]] @ net.believe[k, : net.layout.sizes[k]] + net.site[k] + overall[:, 0]
        for k in sites
    ]
    wide = torch.stack(tokens, dim=1)
    for block in net.blocks:
        wide = block(wide, seen)
    wide = net.norm(wide)
    heads = [wide[:, k] @ net.head[k] + net.head_bias[k] for k in sites]
    return torch.cat([out[:, : net.layout.sizes[k]] for k, out in zip(sites, heads, strict=True)], dim=1)


@given(rank=st.integers(1, 3), refinements=st.integers(1, 3), people=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_numbers_equal_naive_loops_over_sites_and_refinements(
    rank: int, refinements: int, people: int
) -> None:
    net = network(rank, refinements)
    features = torch.randn(people, 3, 5)
    clean = (features - net.feature_mean) / net.feature_std
    seen, overall = net.seen_norm(net.see(clean) + net.position), net.overall(clean.mean(1, keepdim=True))
    theta = torch.zeros(people, net.layout.size)
    for _ in range(refinements):
        theta = theta + naive_delta(net, seen, overall, theta)
    torch.testing.assert_close(net(features), net.mean + net.spread * theta, rtol=1e-4, atol=1e-5)


def test_people_do_not_influence_each_other() -> None:
    net, features = network(), torch.randn(4, 3, 5)
    torch.testing.assert_close(net(features)[2:3], net(features[2:3]))


def test_features_are_normalised_by_their_own_statistics() -> None:
    net, features = network(), (torch.randn(900, 3, 5) * 3 + 2).half()
    net.normalise(net.mean, net.spread, features)
    torch.testing.assert_close(net.feature_mean, features.float().mean((0, 1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.feature_std, features.float().std((0, 1)), rtol=1e-3, atol=1e-3)


def test_begins_near_the_mean_and_no_parameter_is_dead() -> None:
    layout, basis = Layout(SITES, 1, 6, 4), seeded_basis(SITES, 6, 4, 0)
    net = HyperNetwork(layout, NetworkShape(3, 5, 8, 2, 2, 2), basis, learn_basis=True)
    net.normalise(torch.randn(layout.size), torch.full((layout.size,), 0.1), torch.randn(9, 3, 5))
    numbers = net(torch.randn(4, 3, 5))
    assert (numbers - net.mean).abs().max() < 0.01
    made = factors(layout, net.basis(), numbers)
    torch.stack([(up @ down).square().sum() for down, up in made.values()]).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_seeded_bases_are_constants_outside_the_checkpoint_and_learned_ones_parameters() -> None:
    plain, pro = network(), network(learn_basis=True)
    bases = {f"basis_{side}_{k}" for side in ("down", "up") for k in range(len(SITES))}
    assert set(pro.state_dict()) - set(plain.state_dict()) == bases
    assert {n for n, _ in pro.named_parameters()} - {n for n, _ in plain.named_parameters()} == bases
    features = torch.randn(2, 3, 5)
    torch.testing.assert_close(plain(features), pro(features))
    assert plain.named_basis().source == "seed:0"
    assert pro.named_basis().source == f"hypernet:{basis_fingerprint(pro.basis())}"
    assert not pro.named_basis().down[SITES[0].name].requires_grad


def test_the_seed_decides_the_first_weights_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    layout, basis, shape = (
        Layout(SITES, 1, 6, 4),
        seeded_basis(SITES, 6, 4, 0),
        NetworkShape(3, 5, 8, 1, 2, 1),
    )
    first, same, other = (HyperNetwork(layout, shape, basis, seed=seed).site for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_numbers_are_float32_under_autocast(dtype: torch.dtype) -> None:
    net, features = network(), torch.randn(2, 3, 5)
    with torch.autocast("cpu", dtype):
        numbers = net(features)
    assert numbers.dtype == torch.float32
    torch.testing.assert_close(numbers, net(features), rtol=0.1, atol=0.3)
