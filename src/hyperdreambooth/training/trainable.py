"""What a training changes: leaf tensors, and how the base wears what they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.lidb.weights import FrozenFactors, Layout
from hyperdreambooth.lora.inject import Worn, wear
from hyperdreambooth.lora.relax import concatenate
from hyperdreambooth.precision import compute_dtype
from hyperdreambooth.shapes import Factors, alike

Put: TypeAlias = Callable[[int], None]
"""Puts the current leaves on the base, for batches with this many samples in a row for each person."""


_Shapes: TypeAlias = Mapping[str, tuple[torch.Size, torch.Size]]


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
        to_factors: a differentiable function from the leaves and a number format to the factors of the same
            `n` people in this format.
        fixed: the other tensors of the people that `to_factors` reads; None where it reads what is nobody's.
    """

    leaves: dict[str, Tensor]
    to_factors: Callable[[Mapping[str, Tensor], torch.dtype], Factors]
    fixed: tuple[Tensor, ...] | None = None

    @property
    def parts(self) -> set[str]:
        """The components of the base that wear the factors."""
        with torch.no_grad():
            return {site.split(".", 1)[0] for site in self.to_factors(self.leaves, torch.float32)}

    def worn(self) -> Factors:
        """Returns a copy of the current factors, on the CPU and without gradients."""
        with torch.no_grad():
            now = self.to_factors(self.leaves, torch.float32).items()
            return {name: (down.to("cpu", copy=True), up.to("cpu", copy=True)) for name, (down, up) in now}

    @contextmanager
    def on(self, base: Base) -> Generator[Put]:
        """Puts the factors on the base for the length of the block, from the first call on.

        A step that is replayed from its start, because another person's was recorded, calls it never.
        """
        with ExitStack() as stack:
            worn: Worn | None = None

            def put(images: int) -> None:
                nonlocal worn
                worn = worn or stack.enter_context(wear(base.components, self.worn()))
                dtype = compute_dtype(base.device, base.dtype)
                worn.set(self.to_factors(self.leaves, dtype), images)

            yield put


def leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a float32 copy that requires gradients, whatever the number format of the base."""
    return tensor.detach().to(device, torch.float32, copy=True).requires_grad_()


def numbers_of(
    layout: Layout, basis: Basis, start: Tensor, people: int, device: torch.device
) -> FactorLeaves:
    """Returns LiDB numbers over frozen bases as one leaf `(n, P)`; everybody starts from `start` `(P,)`."""
    numbers, factors = leaf(start.repeat(people, 1), device), FrozenFactors(layout, basis)

    def to_factors(now: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        made = factors(now["numbers"])
        # the products are float32; one cast of all of them instead of two a site
        return made if dtype == torch.float32 else _split(_flat(made).to(dtype), _shapes(made))

    return FactorLeaves({"numbers": numbers}, to_factors)


def pairs(trained: Factors, device: torch.device) -> FactorLeaves:
    """Returns factors as one leaf, so that an optimiser's step takes a few kernels and not thousands."""
    flat, shapes = _flat(trained), _shapes(trained)
    return FactorLeaves(
        {"factors": leaf(flat, device)},
        lambda now, dtype: _split(now["factors"].to(dtype), shapes),  # one cast instead of two a site
        fixed=(),
    )


def _shapes(people: Factors) -> _Shapes:
    """Returns the shapes of down `(n, r, i)` and up `(n, o, r)` of every site."""
    return {site: (down.shape, up.shape) for site, (down, up) in people.items()}


def _flat(people: Factors) -> Tensor:
    """Returns all factors side by side, one row a person."""
    return torch.cat([factor.flatten(1) for pair in people.values() for factor in pair], dim=1)


def _split(flat: Tensor, shapes: _Shapes) -> Factors:
    """Returns the factors of such shapes, cut from `flat`."""
    sizes = [size for pair in shapes.values() for size in pair]
    parts = iter(flat.split([size[1:].numel() for size in sizes], dim=1))
    made = {site: (next(parts).view(down), next(parts).view(up)) for site, (down, up) in shapes.items()}
    if len(flat) == 1:
        return made
    # batched products give transposed gradients, which would be copied one by one; thus by all of one shape
    downs, ups = (_gathered({site: pair[side] for site, pair in made.items()}) for side in (0, 1))
    return {site: (downs[site], ups[site]) for site in made}


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the same tensors; those of one shape lie in one piece of memory, and so do their gradients."""
    made: dict[str, Tensor] = {}
    for names in alike(tensors):
        made |= zip(names, torch.stack([tensors[name] for name in names]).unbind(), strict=True)
    return made


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
    still, shapes = _flat(frozen).to(device), _shapes(frozen)
    inner = pairs(trained, device)

    def to_factors(now: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return concatenate(_split(still.to(dtype), shapes), inner.to_factors(now, dtype))

    return FactorLeaves(inner.leaves, to_factors, fixed=(still,))
