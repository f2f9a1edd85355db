"""What a training moves: leaf tensors, and the LoRA factors that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdreambooth.lora.relax import concatenate
from hyperdreambooth.shapes import Factors


@dataclass(frozen=True)
class Trainable:
    """Leaf tensors and what the base wears for them.

    Attributes:
        leaves: name → tensor that the optimiser moves.
        to_factors: differentiable; the leaves → factors of the same `n` people.
    """

    leaves: dict[str, Tensor]
    to_factors: Callable[[Mapping[str, Tensor]], Factors]

    def worn(self) -> Factors:
        """A copy of what the base wears now, on the CPU and outside any gradient."""
        with torch.no_grad():
            now = self.to_factors(self.leaves).items()
            return {name: (down.to("cpu", copy=True), up.to("cpu", copy=True)) for name, (down, up) in now}


def leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """A float32 copy that takes gradients, whatever the base's own format (LIBRARIES: bf16 bases)."""
    return tensor.detach().to(device, torch.float32, copy=True).requires_grad_()


def pairs(trained: Factors, device: torch.device) -> Trainable:
    """Both factors of every site are leaves of their own."""
    names = tuple(trained)
    leaves = {
        f"{name}.{end}": leaf(tensor, device)
        for name, pair in trained.items()
        for end, tensor in zip(("down", "up"), pair, strict=True)
    }
    return Trainable(leaves, lambda now: {name: (now[f"{name}.down"], now[f"{name}.up"]) for name in names})


def together(factors: Sequence[Factors]) -> Factors:
    """One set of factors for all: the identities of the given ones in a row."""
    return {
        site: (torch.cat([f[site][0] for f in factors]), torch.cat([f[site][1] for f in factors]))
        for site in factors[0]
    }


def each(factors: Factors) -> list[Factors]:
    """Every identity's own factors, `n = 1`, of those of many."""
    count = len(next(iter(factors.values()))[0])
    return [
        {site: (down[k : k + 1].clone(), up[k : k + 1].clone()) for site, (down, up) in factors.items()}
        for k in range(count)
    ]


def beside(frozen: Factors, trained: Factors, device: torch.device) -> Trainable:
    """A trained LoRA worn beside a frozen one: concatenating along the rank adds the two ΔW."""
    still = {name: (down.to(device), up.to(device)) for name, (down, up) in frozen.items()}
    inner = pairs(trained, device)
    return Trainable(inner.leaves, lambda now: concatenate(still, inner.to_factors(now)))
