"""Bases: orthonormal, the same bits everywhere, each site on its own; the fingerprint tolerates rounding."""

from __future__ import annotations

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdreambooth.lidb.basis import Basis, basis_fingerprint, seed_of, seeded_basis
from hyperdreambooth.shapes import Site


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
def test_rows_of_down_and_columns_of_up_are_orthonormal(i: int, o: int, a: int, d: int, seed: int) -> None:
    basis = seeded_basis([Site("unet.x", i, o)], a, d, seed)
    down, up = basis.down["unet.x"], basis.up["unet.x"]
    assert down.shape == (min(a, i), i) and up.shape == (o, min(d, o))
    assert down.dtype == up.dtype == torch.float32 and down.is_contiguous() and up.is_contiguous()
    torch.testing.assert_close(down @ down.T, torch.eye(len(down)), atol=2e-6, rtol=0)
    torch.testing.assert_close(up.T @ up, torch.eye(up.shape[1]), atol=2e-6, rtol=0)


def test_a_basis_depends_on_seed_site_and_side_only() -> None:
    alone = seeded_basis(small.SITES[:1], 8, 5, 0)
    together = seeded_basis(small.SITES, 8, 5, 0)
    name = small.SITES[0].name
    assert torch.equal(alone.down[name], together.down[name]) and torch.equal(
        alone.up[name], together.up[name]
    )
    other = seeded_basis(small.SITES, 8, 5, 1)
    assert not torch.allclose(other.down[name], together.down[name])
    twins = seeded_basis([Site("unet.a", 6, 6), Site("unet.b", 6, 6)], 6, 6, 0)
    assert not torch.allclose(twins.down["unet.a"], twins.down["unet.b"])
    assert not torch.allclose(twins.down["unet.a"], twins.up["unet.a"].T)


def test_bits_do_not_follow_the_thread_count() -> None:
    site, threads = Site("unet.wide", 640, 1280), torch.get_num_threads()
    made: list[Basis] = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(seeded_basis([site], 100, 50, 0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0].down["unet.wide"], made[1].down["unet.wide"])
    assert torch.equal(made[0].up["unet.wide"], made[1].up["unet.wide"])


def test_seed_0_is_what_it_was_when_files_were_made() -> None:
    """Changing the draw would silently turn every LiDB file into somebody else."""
    basis = seeded_basis([Site("unet.golden", 6, 4)], 2, 2, 0)
    rows = [
        [0.3256579, 0.3569242, -0.8329135, -0.0448385, 0.1842643, 0.1919464],
        [-0.2021121, 0.7605585, 0.2940183, -0.0186391, -0.2769888, 0.4660305],
    ]
    torch.testing.assert_close(basis.down["unet.golden"], torch.tensor(rows), atol=1e-6, rtol=0)
    assert basis.source == "seed:0" and basis_fingerprint(basis) == "77fd52a03cc4837f"


def test_the_fingerprint_tolerates_rounding_and_sees_everything_else() -> None:
    basis = seeded_basis(small.SITES, 8, 5, 0)
    print_of = basis_fingerprint(basis)
    assert len(print_of) == 16 and int(print_of, 16) >= 0
    nudged = Basis("x", {k: v * (1 + 1e-7) for k, v in basis.down.items()}, dict(basis.up))
    assert basis_fingerprint(nudged) == print_of
    name = small.SITES[2].name
    swapped = {**basis.down, name: basis.down[name].flip(0)}
    assert basis_fingerprint(Basis("x", swapped, basis.up)) != print_of
    assert basis_fingerprint(Basis("x", basis.down, {**basis.up, name: -basis.up[name]})) != print_of
    assert basis_fingerprint(seeded_basis(small.SITES[:-1], 8, 5, 0)) != print_of
    assert basis_fingerprint(seeded_basis(small.SITES, 8, 5, 1)) != print_of
    assert basis_fingerprint(seeded_basis(small.SITES, 7, 5, 0)) != print_of


def test_moving_a_basis_keeps_it() -> None:
    basis = seeded_basis(small.SITES, 8, 5, 0)
    moved = basis.to("cpu")
    assert moved.source == basis.source and basis_fingerprint(moved) == basis_fingerprint(basis)


@pytest.mark.parametrize(
    ("source", "seed"), [("seed:0", 0), ("seed:-7", -7), ("seed:", None), ("hypernet:ab12", None)]
)
def test_the_seed_of_a_source(source: str, seed: int | None) -> None:
    assert seed_of(source) == seed


def test_a_seeded_basis_is_drawn_once_and_never_written_to() -> None:
    first, again = (seeded_basis(small.SITES, 8, 5, 0) for _ in range(2))
    assert all(first.down[name] is again.down[name] for name in first.down)
    with pytest.raises(AttributeError):
        first.source = "seed:1"  # type: ignore[misc]
