"""How far two sets of pictures are apart, in the features of a network."""

from __future__ import annotations

import torch
from torch import Tensor


# Equation 6 of Heusel et al. (arXiv 1706.08500)
def frechet(one: Tensor, other: Tensor) -> float:
    """Returns the squared Fréchet distance of the Gaussians with the means and covariances of two sets.

    With few pictures it is too large. The bias grows with the number of features and falls with that of
    pictures, so only distances of equally many pictures compare.

    Args:
        one, other: features `(m, f)` and `(n, f)`, of at least two pictures each.
    """
    (mean, spread), (mean_other, spread_other) = _gaussian(one), _gaussian(other)
    # tr √(AB) is the sum of the roots of the eigenvalues of √A B √A, which is symmetric.
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ spread_other @ root).clamp(min=0).sqrt().sum()
    return float((mean - mean_other).square().sum() + spread.trace() + spread_other.trace() - 2 * shared)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    exact = features.double()
    return exact.mean(dim=0), torch.cov(exact.T)


# Bińkowski et al. (arXiv 1801.01401), section 4: the unbiased estimate, of whole sets at once
def kernel(one: Tensor, other: Tensor) -> float:
    """Returns the squared maximum mean discrepancy of two sets under the kernel `(x · y / f + 1)³`.

    It has no bias, so sets of any size compare; of one distribution it is around 0, and may be below.

    Args:
        one, other: features `(m, f)` and `(n, f)`, of at least two pictures each.
    """
    x, y = one.double(), other.double()
    return float(_apart(x) + _apart(y) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def _apart(x: Tensor) -> Tensor:
    """Returns the mean kernel of two different members of a set."""
    alike = _kernel(x, x)
    return (alike.sum() - alike.trace()) / (len(x) * (len(x) - 1))
