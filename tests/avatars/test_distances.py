"""Distances of sets of features, against closed forms and loops."""

from __future__ import annotations

import pytest
import torch

from hyperdreambooth.avatars.build.distances import frechet, kernel
from hyperdreambooth.runs import rng


def features(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=rng("features", seed), dtype=torch.float64)


def exactly(count: int, mean: torch.Tensor, spread: torch.Tensor, seed: int) -> torch.Tensor:
    """A set of features whose mean and covariance are exactly these."""
    white = features(count, len(mean), seed)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    return white @ torch.linalg.cholesky(spread).T + mean


def test_frechet_of_gaussians_in_closed_form() -> None:
    one, other = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    mean = torch.tensor([0.5, -1.0, 2.0]).double()
    found = frechet(exactly(50, torch.zeros(3).double(), one.diag(), 0), exactly(80, mean, other.diag(), 1))
    # of commuting covariances: |μ|² + Σ (√a - √b)²
    assert found == pytest.approx(float((mean**2).sum() + (one.sqrt() - other.sqrt()).square().sum()))


def test_frechet_of_covariances_that_do_not_commute() -> None:
    one = torch.tensor([[2.0, 0.8], [0.8, 1.0]]).double()
    other = torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    zero = torch.zeros(2).double()
    # of two dimensions: tr √(AB) = √(tr AB + 2 √det AB)
    product = one @ other
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = one.trace() + other.trace() - 2 * root
    found = frechet(exactly(40, zero, one, 0), exactly(40, zero, other, 1))
    assert found == pytest.approx(float(expected))
    assert found == pytest.approx(frechet(exactly(40, zero, other, 1), exactly(40, zero, one, 0)))


def test_a_set_is_no_distance_from_itself() -> None:
    some = features(30, 6, 0)
    assert frechet(some, some) == pytest.approx(0.0, abs=1e-9)
    few = features(4, 6, 0)  # a covariance without full rank
    assert frechet(few, few) == pytest.approx(0.0, abs=1e-6)
    # the unbiased estimate leaves out the pairs of a picture with itself, which are the most alike
    assert kernel(some, some) < 0


def test_kernel_is_a_loop_over_pairs() -> None:
    x, y = features(7, 5, 0), features(9, 5, 1) + 0.5

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = [
        sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    across = sum(k(a, b) for a in x for b in y) / (7 * 9)
    assert kernel(x, y) == pytest.approx(sum(within) - 2 * across)


def test_kernel_has_no_bias() -> None:
    far = features(4000, 4, 99)
    found = [kernel(features(20, 4, seed), features(20, 4, 1000 + seed)) for seed in range(400)]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 20
    assert abs(float(mean)) < 3 * float(error)
    assert kernel(far, far + 1.0) > 10 * float(error)
