"""What a training changes: leaf tensors, and how the base wears what they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.lidb.weights import Layout, factors
from hyperdreambooth.lora.inject import wear
from hyperdreambooth.lora.relax import concatenate
from hyperdreambooth.shapes import Factors

Put: TypeAlias = Callable[[int], None]
"""Puts the current leaves on the base, for batches with this many samples in a row for each person."""


class Trainable(Protocol):
    """The interface of everything that the loop trains.

    Attributes:
        leaves: name → tensor that the optimiser changes; the first axis is the people, unless there is one.
        parts: the components of the base whose outputs depend on the leaves.
    """

    @property
    def leaves(self) -> Mapping[str, Tensor]: ...
    @property
    def parts(self) -> set[str]: ...
    def on(self, base: Base) -> AbstractContextManager[Put]:
        """Puts the leaves on the base for the length of the block; afterwards the base is as before."""
        ...


@dataclass(frozen=True)
class FactorLeaves:
    """Leaves that stand for LoRA factors.

    Attributes:
        leaves: name → tensor `(n, …)`.
        to_factors: a differentiable function from the leaves to the factors of the same `n` people.
    """

    leaves: dict[str, Tensor]
    to_factors: Callable[[Mapping[str, Tensor]], Factors]

    @property
    def parts(self) -> set[str]:
        """The components of the base that wear the factors."""
        with torch.no_grad():
            return {site.split(".", 1)[0] for site in self.to_factors(self.leaves)}

    def worn(self) -> Factors:
        """Returns a copy of the current factors, on the CPU and without gradients."""
        with torch.no_grad():
            now = self.to_factors(self.leaves).items()
            return {name: (down.to("cpu", copy=True), up.to("cpu", copy=True)) for name, (down, up) in now}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """Puts the factors on the base for the length of the block."""
        with wear(base.components, self.worn()) as worn:
            yield lambda images: worn.set(self.to_factors(self.leaves), images)


def leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a float32 copy that requires gradients, whatever the number format of the base."""
    return tensor.detach().to(device, torch.float32, copy=True).requires_grad_()


def numbers_of(
    layout: Layout, basis: Basis, start: Tensor, people: int, device: torch.device
) -> FactorLeaves:
    """Returns LiDB numbers over frozen bases as one leaf `(n, P)`; everybody starts from `start` `(P,)`."""
    numbers = leaf(start.repeat(people, 1), device)
    return FactorLeaves({"numbers": numbers}, lambda now: factors(layout, basis, now["numbers"]))


def pairs(trained: Factors, device: torch.device) -> FactorLeaves:
    """Returns factors as one leaf, so that an optimiser's step takes a few kernels and not thousands."""
    tensors = [tensor for pair in trained.values() for tensor in pair]
    widths, shapes = [tensor[0].numel() for tensor in tensors], [tensor.shape for tensor in tensors]

    def to_factors(now: Mapping[str, Tensor]) -> Factors:
        parts = now["factors"].split(widths, dim=1)
        made = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return dict(zip(trained, zip(made[::2], made[1::2], strict=True), strict=True))

    flat = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)
    return FactorLeaves({"factors": leaf(flat, device)}, to_factors)


def each(people: Factors) -> list[Factors]:
    """Splits the factors of `n` people into one set for each person."""
    count = len(next(iter(people.values()))[0])
    return [
        {site: (down[k : k + 1].clone(), up[k : k + 1].clone()) for site, (down, up) in people.items()}
        for k in range(count)
    ]


def hashed(people: Sequence[Factors]) -> str:
    """Returns sixteen hex digits that name the factors of all these people."""
    digest = hashlib.sha256()
    for one in people:
        for site, pair in sorted(one.items()):
            content = [factor.detach().float().cpu().numpy().tobytes() for factor in pair]
            digest.update(site.encode() + b"".join(content))
    return digest.hexdigest()[:16]


def beside(frozen: Factors, trained: Factors, device: torch.device) -> FactorLeaves:
    """Returns a trained LoRA worn beside a frozen one: concatenating them along the rank adds the two ΔW."""
    still = {name: (down.to(device), up.to(device)) for name, (down, up) in frozen.items()}
    inner = pairs(trained, device)
    return FactorLeaves(inner.leaves, lambda now: concatenate(still, inner.to_factors(now)))
