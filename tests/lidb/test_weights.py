"""Numbers ↔ factors against naive loops; the shared start; distances of ΔW; the balanced form."""

from __future__ import annotations

import json

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperdreambooth.lidb.basis import Basis, seeded_basis
from hyperdreambooth.lidb.weights import FrozenFactors, Layout, delta_products, factors, start
from hyperdreambooth.shapes import Site

RANKS, DIMS = st.integers(1, 3), st.integers(1, 20)


def deltas(layout: Layout, numbers: Tensor, basis: Basis) -> Tensor:
    """Oracle: ΔW from the paper's four matrices, one identity and one site at a time, `(n, Σ o·i)`."""
    rows: list[Tensor] = []
    for row in numbers:
        position, flat = 0, []
        for site in sorted(layout.sites):
            a, d = min(layout.down_dim, site.in_features), min(layout.up_dim, site.out_features)
            middle = position + layout.rank * a
            a_train = row[position:middle].reshape(layout.rank, a)
            position = middle + layout.rank * d
            b_train = row[middle:position].reshape(d, layout.rank)
            flat.append((basis.up[site.name] @ b_train @ a_train @ basis.down[site.name]).flatten())
        rows.append(torch.cat(flat))
    return torch.stack(rows)


def basis_for(layout: Layout) -> Basis:
    return seeded_basis(layout.sites, layout.down_dim, layout.up_dim, 0)


@settings(max_examples=25, deadline=None)
@given(RANKS, DIMS, DIMS, st.integers(1, 4))
def test_factors_equal_the_naive_loop(rank: int, a: int, d: int, n: int) -> None:
    layout = small.layout(rank, a, d)
    numbers, basis = small.numbers(layout, n), basis_for(layout)
    made = factors(layout, basis, numbers)
    for site in layout.sites:
        down, up = made[site.name]
        assert down.shape == (n, rank, site.in_features) and up.shape == (n, site.out_features, rank)
    flat = torch.cat([(made[s.name][1] @ made[s.name][0]).flatten(1) for s in layout.sites], dim=1)
    torch.testing.assert_close(flat, deltas(layout, numbers, basis), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("people", "rank"), [(1, 1), (1, 3), (2, 1), (4, 2)])
def test_sites_of_equal_shape_in_one_product(people: int, rank: int) -> None:
    """Factors and gradients are those of one product a site."""
    layout = small.layout(rank, 6, 5)
    basis = basis_for(layout)
    made: list[tuple[Tensor, Tensor]] = []
    for way in (FrozenFactors(layout, basis), lambda numbers: factors(layout, basis, numbers)):
        numbers = small.numbers(layout, people).clone().requires_grad_()
        flat = torch.cat([part.flatten(1) for pair in way(numbers).values() for part in pair], dim=1)
        (flat * torch.linspace(-1, 1, flat.shape[1])).sum().backward()
        assert numbers.grad is not None
        made.append((flat.detach(), numbers.grad))
    for grouped, alone in zip(*made, strict=True):
        assert (grouped - alone).norm() <= 1e-6 * alone.norm()


@settings(max_examples=25, deadline=None)
@given(RANKS, DIMS, DIMS, st.integers(0, 4))
def test_split_and_join_are_inverse(rank: int, a: int, d: int, n: int) -> None:
    layout = small.layout(rank, a, d)
    numbers = small.numbers(layout, n)
    assert layout.size == sum(rank * (min(a, s.in_features) + min(d, s.out_features)) for s in layout.sites)
    assert torch.equal(layout.join(layout.split(numbers)), numbers)
    for site, begin, end in zip(layout.sites, layout.offsets, layout.offsets[1:], strict=False):
        own = layout.join({s.name: layout.split(numbers)[s.name] for s in layout.sites})[:, begin:end]
        parts = layout.split(numbers)[site.name]
        assert torch.equal(own, torch.cat([parts[0].flatten(1), parts[1].flatten(1)], dim=1))


def test_a_layout_is_pure_hashable_and_independent_of_the_order_of_sites() -> None:
    layout = small.layout()
    again = Layout(tuple(reversed(small.SITES)), 1, 8, 5)
    assert layout == again and hash(layout) == hash(again) and {layout: 1}[again] == 1
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert layout != small.layout(rank=2)
    spans = layout.components
    assert list(spans) == ["text_encoder", "unet"]
    assert spans["text_encoder"].start == 0 and spans["text_encoder"].stop == spans["unet"].start
    assert spans["unet"].stop == layout.size


def test_components_with_a_common_beginning_stay_apart() -> None:
    names = ["text_encoder_2.b", "text_encoder.a", "text_encoder.z", "text_encoder_2.a"]
    layout = Layout(tuple(Site(name, 4, 4) for name in names), 1, 2, 2)
    assert layout.components == {"text_encoder": slice(0, 8), "text_encoder_2": slice(8, 16)}


@pytest.mark.parametrize("bad", [(small.SITES, 0, 8, 5), (small.SITES, 1, 0, 5), ((), 1, 8, 5)])
def test_impossible_layouts_are_refused(bad: tuple[tuple[Site, ...], int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Layout(*bad)


def test_wrong_shapes_are_refused() -> None:
    layout = small.layout()
    for shape in ((layout.size,), (2, layout.size + 1)):
        with pytest.raises(ValueError, match=r"expected numbers"):
            layout.split(torch.zeros(shape))


def test_factors_are_differentiable_in_numbers_and_bases() -> None:
    layout = Layout(small.SITES[:2], 2, 3, 2)
    basis = basis_for(layout)
    numbers = small.numbers(layout, 2).requires_grad_()
    learned = Basis(
        "x", *({k: v.clone().requires_grad_() for k, v in m.items()} for m in (basis.down, basis.up))
    )
    sum((u @ d).square().sum() for d, u in factors(layout, learned, numbers).values()).backward()
    oracle = small.numbers(layout, 2).requires_grad_()
    deltas(layout, oracle, basis).square().sum().backward()
    assert numbers.grad is not None and oracle.grad is not None
    torch.testing.assert_close(numbers.grad, oracle.grad, atol=1e-4, rtol=1e-4)
    assert all(m.grad is not None and m.grad.any() for m in (*learned.down.values(), *learned.up.values()))


def test_an_identity_does_not_see_the_others() -> None:
    layout = small.layout(rank=2)
    numbers, basis = small.numbers(layout, 3).requires_grad_(), basis_for(layout)
    down, up = factors(layout, basis, numbers)[layout.sites[0].name]
    (down[1].sum() + up[1].sum()).backward()
    assert numbers.grad is not None and numbers.grad[1].any() and not numbers.grad[[0, 2]].any()


def test_autocast_does_not_reach_the_products() -> None:
    layout = small.layout(rank=2)
    numbers, basis = small.numbers(layout, 2), basis_for(layout)
    plain, products = factors(layout, basis, numbers), delta_products(layout, numbers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_products = factors(layout, basis, numbers), delta_products(layout, numbers)
    for name, (down, up) in cast.items():
        assert torch.equal(down, plain[name][0]) and torch.equal(up, plain[name][1])
        assert torch.equal(cast_products[name], products[name])


def test_the_start_is_shared_alive_and_zero() -> None:
    layout = small.layout(rank=2)
    first = start(layout, 0)
    assert first.shape == (layout.size,) and torch.equal(first, start(layout, 0))
    assert not torch.equal(first, start(layout, 1))
    fewer = Layout(layout.sites[2:], 2, 8, 5)
    assert torch.equal(start(fewer, 0), first[layout.offsets[2] :])
    numbers = first[None].clone().requires_grad_()
    made = factors(layout, basis_for(layout), numbers)
    assert all(not (up @ down).any() for down, up in made.values())
    sum((up @ down).sum() for down, up in made.values()).backward()
    assert numbers.grad is not None
    assert all(b.any() for _, b in layout.split(numbers.grad).values())


def test_the_start_has_rows_of_about_norm_one() -> None:
    layout = Layout(tuple(Site(f"unet.{k}", 320, 320) for k in range(50)), 1, 100, 50)
    norms = torch.stack([a.norm() for a, _ in layout.split(start(layout, 0)[None]).values()])
    assert abs(norms.mean() - 1) < 0.05


@settings(max_examples=20, deadline=None)
@given(RANKS, DIMS, DIMS)
def test_distances_of_products_are_distances_of_delta_w(rank: int, a: int, d: int) -> None:
    layout = small.layout(rank, a, d)
    pair = small.numbers(layout, 2)
    full = deltas(layout, pair, basis_for(layout))
    products = delta_products(layout, pair)
    flat = torch.cat([products[s.name].flatten(1) for s in layout.sites], dim=1)
    torch.testing.assert_close((flat[0] - flat[1]).norm(), (full[0] - full[1]).norm(), atol=1e-4, rtol=1e-5)
