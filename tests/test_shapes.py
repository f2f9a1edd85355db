"""Array types: a wrong shape stops at the call it enters, in tests; names and fingerprints of sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError

from hyperdreambooth.hypernet.loss import size_loss
from hyperdreambooth.lidb.weights import Layout, delta_products
from hyperdreambooth.lora.inject import add_delta
from hyperdreambooth.lora.relax import concatenate, thin_svd
from hyperdreambooth.shapes import Site

LAYOUT = Layout((Site("unet.x", 4, 3),), 1, 4, 3)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda: thin_svd(zeros(1, 2, 3), zeros(1, 4, 3)),  # two ranks
        lambda: thin_svd(zeros(2, 3), zeros(4, 2)),  # no identity axis
        lambda: thin_svd(zeros(1, 2, 3).int(), zeros(1, 4, 2)),  # no floats
        lambda: concatenate({"x": (zeros(1, 2, 3), zeros(1, 4, 2))}, {"x": (zeros(2, 1, 3), zeros(2, 4, 1))}),
        lambda: add_delta(zeros(2, 5, 4), zeros(2, 6, 3), zeros(1, 1, 3), zeros(1, 4, 1), 1),  # two lengths
        lambda: delta_products(LAYOUT, zeros(LAYOUT.size)),  # no identity axis
        lambda: size_loss(zeros(2, 5), zeros(5), zeros(6)),
    ],
)
def test_a_wrong_shape_is_stopped(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()
