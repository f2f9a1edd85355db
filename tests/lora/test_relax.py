"""Rank changes: exact at step 0, alive in every slot, and equal to the dense SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperdreambooth.lora.relax import (
    add_up,
    concatenate,
    fresh,
    norm,
    relative_distance,
    relax,
    scaled,
    thin_svd,
    truncate,
)
from hyperdreambooth.shapes import Factors, Site

SITES = (Site("unet.a.to_q", 12, 20), Site("unet.b.to_k", 16, 8))
sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))


def factors_of(n: int, rank: int, i: int, o: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, i, generator=generator), torch.randn(n, o, rank, generator=generator)


def adapter(n: int, rank: int, seed: int = 0) -> Factors:
    return {s.name: factors_of(n, rank, s.in_features, s.out_features, seed) for s in SITES}


def delta(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1] @ pair[0]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()) + 1e-12)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_thin_svd_equals_dense(size: tuple[int, int, int, int]) -> None:
    n, rank, i, o = size
    down, up = factors_of(n, rank, i, o)
    u, s, vh = thin_svd(down, up)
    k = min(rank, i, o)
    assert (u.shape, s.shape, vh.shape) == ((n, o, k), (n, k), (n, k, i))
    close(u * s[:, None] @ vh, up @ down)
    close(s, torch.linalg.svdvals(up.double() @ down.double())[:, :k].float())
    eye = torch.eye(k).expand(n, k, k)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=1e-5)


def test_a_diverged_identity_stays_so_and_leaves_the_others_alone() -> None:
    down, up = factors_of(3, 4, 7, 5)
    wanted, _ = truncate({"a": (down, up)}, 2)
    up[1, 0, 0] = torch.nan
    got, error = truncate({"a": (down, up)}, 2)
    assert error != error and delta(got["a"])[1].isnan().all()
    close(delta(got["a"])[::2], delta(wanted["a"])[::2])


def test_thin_svd_passes_gradients() -> None:
    down, up = (f.double().requires_grad_() for f in factors_of(2, 3, 7, 5))
    u, s, vh = thin_svd(down, up)
    got = torch.autograd.grad((u * s[:, None] @ vh).square().sum(), (down, up))
    wanted = torch.autograd.grad((up @ down).square().sum(), (down, up))
    torch.testing.assert_close(got, wanted)


def slot_gradients(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Size of the gradients of each rank slot `(n, r)` under a generic loss."""
    down, up = (f.detach().requires_grad_() for f in pair)
    target = torch.randn(up.shape[0], up.shape[1], down.shape[2], generator=torch.Generator().manual_seed(3))
    grad_down, grad_up = torch.autograd.grad((up @ down * target).sum(), (down, up))
    return grad_down.norm(dim=2) + grad_up.norm(dim=1)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 12))
def test_relax_is_exact_and_alive(size: tuple[int, int, int, int], more: int) -> None:
    n, rank, i, o = size
    wider = min(rank, i, o) + more
    if wider == 0:
        return
    start = {"unet.x": factors_of(n, rank, i, o)}
    (pair,) = relax(start, wider).values()
    assert (pair[0].shape, pair[1].shape) == ((n, wider, i), (n, o, wider))
    close(delta(pair), delta(start["unet.x"]))
    live = min(wider, i)
    rows = pair[0][:, :live]
    torch.testing.assert_close(rows @ rows.mT, torch.eye(live).expand(n, live, live), rtol=0, atol=1e-5)
    assert (slot_gradients(pair)[:, :live] > 1e-4).all()
    assert not pair[0][:, live:].any() and not pair[1][..., live:].any()


def test_a_relaxed_adapter_trains_at_its_full_rank() -> None:
    down, up = (f.requires_grad_() for f in relax({"unet.x": factors_of(1, 1, 12, 20)}, 4)["unet.x"])
    target = torch.randn(1, 20, 12, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([down, up], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (up @ down - target).square().mean().backward()
        optimizer.step()
    s = torch.linalg.svdvals((up @ down).detach())[0]
    assert int((s > 1e-3 * s[0]).sum()) == 4


def test_relax_keeps_rank_deficient_and_empty_adapters() -> None:
    down, up = factors_of(2, 4, 10, 10)
    up[..., 2:] = 0
    close(delta(relax({"unet.x": (down, up)}, 2)["unet.x"]), up @ down)
    nothing = relax(fresh(SITES, 1), 3)
    assert all(not delta(pair).any() and (slot_gradients(pair) > 0).all() for pair in nothing.values())


def test_relax_is_named_by_its_seed_and_refuses_to_lose() -> None:
    start = adapter(1, 2)
    first, again, other = relax(start, 4), relax(start, 4), relax(start, 4, seed=1)
    assert all(
        torch.equal(first[s][0], again[s][0]) and not torch.equal(first[s][0], other[s][0]) for s in start
    )
    trained = {s: (down.requires_grad_(), up) for s, (down, up) in start.items()}
    assert not any(f.requires_grad for pair in relax(trained, 4).values() for f in pair)
    with pytest.raises(ValueError, match=r"unet\.a\.to_q: rank 2 does not fit into 1"):
        relax(start, 1)


def test_side_by_side_is_exact_and_alive() -> None:
    start, new = adapter(1, 1), fresh(SITES, 3, seed=2)
    both = concatenate(start, new)
    for site, pair in both.items():
        assert pair[0].shape[1] == 4
        close(delta(pair), delta(start[site]))
        assert (slot_gradients(pair) > 1e-4).all()
    merged, error = truncate({s: (d, u + 1) for s, (d, u) in both.items()}, 4)
    assert error < 1e-6
    assert all(torch.allclose(delta(merged[s]), (both[s][1] + 1) @ both[s][0], atol=1e-5) for s in both)
    with pytest.raises(ValueError, match=r"same sites; only one has unet\.a\.to_q"):
        concatenate(start, {"unet.b.to_k": new["unet.b.to_k"]})


def test_fresh_rows_have_norm_one() -> None:
    made = fresh([Site("unet.x", 4096, 8)], 16)["unet.x"]
    torch.testing.assert_close(made[0].norm(dim=2), torch.ones(1, 16), rtol=0.1, atol=0)
    assert made[1].shape == (1, 8, 16) and not made[1].any()
    assert not torch.equal(made[0], fresh([Site("unet.x", 4096, 8)], 16, seed=1)["unet.x"][0])


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 12))
def test_truncate_equals_dense_svd(size: tuple[int, int, int, int], rank: int) -> None:
    n, old, i, o = size
    start = {"unet.x": factors_of(n, old, i, o), "unet.y": factors_of(n, old, i, o, seed=1)}
    kept, error = truncate(start, rank)
    lost = total = 0.0
    for site, pair in start.items():
        dense = delta(pair).double()
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        best = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
        assert kept[site][0].shape == (n, rank, i) and kept[site][1].shape == (n, o, rank)
        close(delta(kept[site]), best.float())
        lost, total = lost + float((dense - best).square().sum()), total + float(dense.square().sum())
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=1e-6)


def test_truncating_nothing_loses_nothing() -> None:
    assert truncate(fresh(SITES, 2), 1)[1] == 0.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2)), min_size=1, max_size=4))
def test_adapters_add_up_exactly(many: list[tuple[int, float]]) -> None:
    sites = {"a": (5, 7), "b": (6, 4), "c": (3, 3)}
    dense = {name: torch.zeros(1, o, i) for name, (i, o) in sites.items()}
    worn: list[Factors] = []
    for k, (rank, weight) in enumerate(many):
        some = {name: size for name, size in sites.items() if name != "abc"[k % 3]}
        own = {name: factors_of(1, rank, i, o, k) for name, (i, o) in some.items()}
        for name, (down, up) in own.items():
            dense[name] += weight * up @ down
        worn.append(scaled(own, weight))
    total = add_up(worn)
    assert set(total) == {name for own in worn for name in own}
    ranks = {name: sum(own[name][0].shape[1] for own in worn if name in own) for name in total}
    assert {name: down.shape[1] for name, (down, _) in total.items()} == ranks
    for name, (down, up) in total.items():
        torch.testing.assert_close(up @ down, dense[name], rtol=1e-4, atol=1e-4)


def test_the_distance_of_two_adapters_is_that_of_their_matrices() -> None:
    one = torch.randn(1, 2, 9), torch.randn(1, 8, 2)
    other = torch.randn(1, 3, 9), torch.randn(1, 8, 3)
    wanted = (one[1] @ one[0] - other[1] @ other[0]).norm() / (one[1] @ one[0]).norm()
    assert relative_distance(one, other) == pytest.approx(float(wanted), rel=1e-5)
    assert norm(one) == pytest.approx(float((one[1] @ one[0]).norm()), rel=1e-5)
    nothing = torch.zeros(1, 2, 9), torch.zeros(1, 8, 2)
    assert relative_distance(one, one) < 1e-7
    assert (relative_distance(nothing, nothing), relative_distance(nothing, one)) == (0.0, 1.0)
