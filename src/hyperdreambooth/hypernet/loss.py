"""The terms of the loss `α · denoising + β · weights + γ · size` (paper, section 4.2; training.md 4, 8)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from hyperdreambooth.lidb.weights import Layout, delta_products
from hyperdreambooth.shapes import Numbers


# ‖B̂ Â - B A‖² = ‖ΔŴ - ΔW‖² with orthonormal aux bases   (training.md 2)
def weight_loss(
    layout: Layout, predicted: Numbers, known: Numbers, scale: Float[Tensor, " s"]
) -> Float[Tensor, " n"]:
    """Returns the distance between two ΔW, each site in units of how much people differ there.

    Predicting the mean of all people has a loss of about 1. `scale` is that of `bank_scale`. The loss is not
    computed from Gram matrices, whose differences cancel.
    """
    ours, theirs = delta_products(layout, predicted), delta_products(layout, known)
    errors = [(ours[site.name] - theirs[site.name]).square().sum(dim=(1, 2)) for site in layout.sites]
    return (torch.stack(errors, dim=1) / scale).mean(dim=1)


# mean ((θ - mean) / spread)²   (training.md 8)
def size_loss(
    predicted: Numbers, mean: Float[Tensor, " P"], spread: Float[Tensor, " P"]
) -> Float[Tensor, " n"]:
    """Returns the mean squared distance of predictions from the mean, in units of the spread."""
    return ((predicted.float() - mean) / spread).square().mean(dim=1)


@torch.no_grad()
def bank_scale(layout: Layout, parts: Iterable[Float[Tensor, "_n P"]]) -> Float[Tensor, " s"]:
    """Returns how much the people of a bank differ at each site: the variance of ΔW, summed over its entries.

    The numbers come in parts that fit into memory. The scale is at least a thousandth of the mean over sites,
    so that a site that nobody uses does not dominate the loss. One person has no variance: then it is the
    size of that person's ΔW.
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    count = 0
    for numbers in parts:
        count += len(numbers)
        for name, product in delta_products(layout, numbers).items():
            product = product.double()
            sums[name] = sums.get(name, 0) + product.sum(0)
            squares[name] = squares.get(name, 0) + product.square().sum()
    if not count:
        raise ValueError("a bank without people has no scale")
    size = torch.stack([squares[site.name] for site in layout.sites]) / count
    variance = size - torch.stack([(sums[site.name] / count).square().sum() for site in layout.sites])
    scale = variance if float(variance.sum()) > 1e-9 * float(size.sum()) else size
    return scale.clamp_min(max(1e-3 * float(scale.mean()), 1e-12)).float()
