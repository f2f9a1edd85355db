"""What a training moves: leaf tensors, and how the base wears what they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import concatenate
from hyperdreambooth.shapes import Factors

Put: TypeAlias = Callable[[int], None]
"""Puts the leaves as they are now on the base, for batches of so many samples in a row of one person."""


class Trainable(Protocol):
    """What the loop needs to know of anything that it trains.

    Attributes:
        leaves: name → tensor that the optimiser moves; the first axis is `people`, unless that is 1.
        people: how many train side by side.
        parts: the base's components that answer otherwise as the leaves move.
    """

    @property
    def leaves(self) -> Mapping[str, Tensor]: ...
    @property
    def people(self) -> int: ...
    @property
    def parts(self) -> set[str]: ...
    def on(self, base: Base) -> AbstractContextManager[Put]:
        """The base with the leaves put on; as it was before when the block ends."""
        ...


@dataclass(frozen=True)
class FactorLeaves:
    """Leaves that stand for LoRA factors.

    Attributes:
        leaves: name → tensor `(n, …)`.
        to_factors: differentiable; the leaves → factors of the same `n` people.
    """

    leaves: dict[str, Tensor]
    to_factors: Callable[[Mapping[str, Tensor]], Factors]

    @property
    def people(self) -> int:
        """How many train side by side."""
        return len(next(iter(self.leaves.values())))

    @property
    def parts(self) -> set[str]:
        """The components that wear some of it."""
        return {site.split(".", 1)[0] for site in self.worn()}

    def worn(self) -> Factors:
        """A copy of what the base wears now, on the CPU and outside any gradient."""
        with torch.no_grad():
            now = self.to_factors(self.leaves).items()
            return {name: (down.to("cpu", copy=True), up.to("cpu", copy=True)) for name, (down, up) in now}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """The base wears the factors."""
        with wear(base.components, self.worn()) as worn:
            yield lambda images: worn.set(self.to_factors(self.leaves), images)


def leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """A float32 copy that takes gradients, whatever the base's own format."""
    return tensor.detach().to(device, torch.float32, copy=True).requires_grad_()


def pairs(trained: Factors, device: torch.device) -> FactorLeaves:
    """Both factors of every site, in one leaf: an optimiser's step is a few kernels, not thousands."""
    tensors = [tensor for pair in trained.values() for tensor in pair]
    widths, shapes = [tensor[0].numel() for tensor in tensors], [tensor.shape for tensor in tensors]

    def to_factors(now: Mapping[str, Tensor]) -> Factors:
        parts = now["factors"].split(widths, dim=1)
        made = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return dict(zip(trained, zip(made[::2], made[1::2], strict=True), strict=True))

    flat = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
    return FactorLeaves({"factors": leaf(flat, device)}, to_factors)


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


def hashed(people: Sequence[Factors]) -> str:
    """Sixteen hex digits of everybody's factors."""
    digest = hashlib.sha256()
    for factors in people:
        for site, pair in sorted(factors.items()):
            numbers = [factor.detach().float().cpu().numpy().tobytes() for factor in pair]
            digest.update(site.encode() + b"".join(numbers))
    return digest.hexdigest()[:16]


def beside(frozen: Factors, trained: Factors, device: torch.device) -> FactorLeaves:
    """A trained LoRA worn beside a frozen one: concatenating along the rank adds the two ΔW."""
    still = {name: (down.to(device), up.to(device)) for name, (down, up) in frozen.items()}
    inner = pairs(trained, device)
    return FactorLeaves(inner.leaves, lambda now: concatenate(still, inner.to_factors(now)))
