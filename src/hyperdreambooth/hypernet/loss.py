"""α · denoising + β · weights + γ · size (paper, section 4.2; training.md 4, 8), each a schedule."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hyperdreambooth.lidb.weights import Layout, delta_products
from hyperdreambooth.shapes import Numbers

Schedule: TypeAlias = float | list[tuple[int, float]]
"""A constant, or `[[step, value], …]` joined by straight lines and constant outside."""


def at(schedule: Schedule, step: int) -> float:
    """The value of a schedule at a step."""
    if not isinstance(schedule, list):
        return float(schedule)
    after = bisect_right([known for known, _ in schedule], step)
    if after in (0, len(schedule)):
        return float(schedule[max(after - 1, 0)][1])
    (left, low), (right, high) = schedule[after - 1], schedule[after]
    return low + (high - low) * (step - left) / (right - left)


# ‖B̂ Â - B A‖² = ‖ΔŴ - ΔW‖² with orthonormal aux bases   (training.md 2)
def weight_loss(
    layout: Layout, predicted: Numbers, known: Numbers, scale: Float[Tensor, " s"]
) -> Float[Tensor, " n"]:
    """Distance of two ΔW, each site measured by how much people differ there: the bank's mean has 1.

    Args:
        layout: where the numbers lie.
        predicted: `(n, P)`.
        known: `(n, P)`, from the bank.
        scale: `(s,)` from `bank_scale`.

    Returns:
        `(n,)` float32; never expanded into Gram matrices, which cancel.
    """
    ours, theirs = delta_products(layout, predicted), delta_products(layout, known)
    errors = [(ours[site.name] - theirs[site.name]).square().sum(dim=(1, 2)) for site in layout.sites]
    return (torch.stack(errors, dim=1) / scale).mean(dim=1)


# mean ((θ̂ - θ) / spread)²   (paper, section 4.2; targets balanced and aligned, training.md 2)
def number_loss(
    predicted: Numbers, known: Float[Tensor, "*_ P"], spread: Float[Tensor, " P"]
) -> Float[Tensor, " n"]:
    """Distance of the numbers themselves `(n, P)`, each in units of its spread `(P,)`; `(n,)`."""
    return ((predicted.float() - known) / spread).square().mean(dim=1)


# mean θ²   (training.md 8)
def size_loss(
    predicted: Numbers, mean: Float[Tensor, " P"], spread: Float[Tensor, " P"]
) -> Float[Tensor, " n"]:
    """How far predictions `(n, P)` stray from the mean, in units of the spread; `(n,)`."""
    return number_loss(predicted, mean, spread)


@torch.no_grad()
def bank_scale(layout: Layout, parts: Iterable[Float[Tensor, "_n P"]]) -> Float[Tensor, " s"]:
    """How much the people of a bank differ at each site: the variance of ΔW, summed over its entries.

    Args:
        layout: where the numbers lie.
        parts: the bank's numbers `(n, P)`, in as many pieces as memory likes.

    Returns:
        `(s,)` float32, at least a thousandth of the mean over sites, so that a site nobody uses does not rule
        the loss. One person has no variance: then the size of its own ΔW.
    """
    first, second, count = None, None, 0
    for numbers in parts:
        products = [each.double() for each in delta_products(layout, numbers).values()]
        sums = [each.sum(0) for each in products]
        squares = torch.stack([each.square().sum() for each in products])
        first = sums if first is None else [a + b for a, b in zip(first, sums, strict=True)]
        second = squares if second is None else second + squares
        count += len(numbers)
    if first is None or second is None:
        raise ValueError("a bank without people has no scale")
    size = second / count
    variance = size - torch.stack([(each / count).square().sum() for each in first])
    scale = variance if float(variance.sum()) > 1e-9 * float(size.sum()) else size
    return scale.clamp_min(max(1e-3 * float(scale.mean()), 1e-12)).float()
