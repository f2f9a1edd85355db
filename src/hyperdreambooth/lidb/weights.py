"""Numbers ↔ LoRA factors: pure functions whose first axis is always the identity.

An identity is a flat row of `P = Σ r · (a_site + d_site)` numbers: for each site, in order of name, `A_train
(r, a)` and then `B_train (d, r)`, row-major. No function mixes rows, so no identity depends on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hyperdreambooth.lidb.basis import Basis, site_dims
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Factors, Numbers, Site, alike, site_fingerprint

Parts: TypeAlias = Mapping[str, tuple[Float[Tensor, "n r _a"], Float[Tensor, "n _d r"]]]
"""Site name → `(A_train, B_train)`."""


@dataclass(frozen=True)
class Layout:
    """The places of every site's numbers in the flat row: sites by name, `r`, `a` and `d`."""

    sites: tuple[Site, ...]
    rank: int
    down_dim: int
    up_dim: int

    def __post_init__(self) -> None:
        if not self.sites or min(self.rank, self.down_dim, self.up_dim) < 1:
            raise ValueError("a layout needs at least one site and rank, down_dim and up_dim of at least 1")
        object.__setattr__(self, "sites", tuple(sorted(self.sites)))

    def dims(self, site: Site) -> tuple[int, int]:
        """Returns `(a_site, d_site)`."""
        return site_dims(site, self.down_dim, self.up_dim)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of numbers of each site, `r · (a_site + d_site)`."""
        return tuple(self.rank * sum(self.dims(site)) for site in self.sites)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """`s + 1` positions: site `k` owns `numbers[:, offsets[k]:offsets[k + 1]]`."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def size(self) -> int:
        """`P`, the number of numbers of one identity."""
        return self.offsets[-1]

    @cached_property
    def components(self) -> dict[str, slice]:
        """Component → its numbers, which are adjacent because site names begin with the component."""
        spans: dict[str, slice] = {}
        for site, start, end in zip(self.sites, self.offsets, self.offsets[1:], strict=False):
            first = spans[site.component].start if site.component in spans else start
            spans[site.component] = slice(first, end)
        return spans

    def split(self, numbers: Tensor) -> Parts:
        """Returns views of numbers `(n, P)`: name → `(A_train (n, r, a_site), B_train (n, d_site, r))`."""
        if numbers.ndim != 2 or numbers.shape[1] != self.size:
            raise ValueError(f"expected numbers of shape (n, {self.size}), got {tuple(numbers.shape)}")
        dims = [self.dims(site) for site in self.sites]
        # one split, as each one's backward pass copies everything that was split
        halves = iter(numbers.split([self.rank * dim for pair in dims for dim in pair], dim=1))
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for site, (a, d) in zip(self.sites, dims, strict=True):
            left, right = next(halves), next(halves)
            parts[site.name] = (left.unflatten(1, (self.rank, a)), right.unflatten(1, (d, self.rank)))
        return parts

    def join(self, parts: Parts) -> Numbers:
        """Returns the numbers `(n, P)` of site name → `(A_train, B_train)`, the inverse of `split`."""
        return torch.cat([part.flatten(1) for site in self.sites for part in parts[site.name]], dim=1)

    def to_json(self) -> dict[str, Any]:
        """Returns the layout as plain data, for manifests and configs."""
        sites = [[site.name, site.in_features, site.out_features] for site in self.sites]
        return {"rank": self.rank, "down_dim": self.down_dim, "up_dim": self.up_dim, "sites": sites}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """Returns the layout that `to_json` wrote."""
        sites = tuple(Site(str(name), int(i), int(o)) for name, i, o in data["sites"])
        return Layout(sites, int(data["rank"]), int(data["down_dim"]), int(data["up_dim"]))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the site list; files state rank and dims in plain text."""
        return site_fingerprint(self.sites)


def factors(layout: Layout, basis: Basis, numbers: Numbers) -> Factors:
    """Returns the LoRA factors of every identity at every site (paper, section 4.1).

    They are `A_train @ A_aux (n, r, i)` and `B_aux @ B_train (n, o, r)`, differentiable in the bases too, and
    always float32: these products cost little beside the base's own, and bf16 would lose half of the digits.
    """
    made: Factors = {}
    with torch.autocast(numbers.device.type, enabled=False):
        for name, (a_train, b_train) in layout.split(numbers.float()).items():
            # one product for all identities instead of n small ones
            down, up = a_train.flatten(0, 1) @ basis.down[name], b_train.mT.flatten(0, 1) @ basis.up[name].mT
            n, rank = a_train.shape[:2]
            made[name] = (down.view(n, rank, -1), up.view(n, rank, -1).mT)
    return made


class FrozenFactors:
    """`factors` over frozen bases, with one product for all sites of equal shape.

    A GPU starts a few dozen kernels for a step's factors instead of four for each site. Factors and gradients
    are those of `factors` up to rounding: for few rows libraries add in an order that depends on how the
    matrices lie in memory.
    """

    def __init__(self, layout: Layout, basis: Basis) -> None:
        names = [site.name for site in layout.sites]
        self._layout = layout
        self._down = _stacked({name: basis.down[name] for name in names})
        self._up = [(some, up.mT) for some, up in _stacked({name: basis.up[name] for name in names})]

    def __call__(self, numbers: Numbers) -> Factors:
        """Returns the factors of every identity at every site, always float32."""
        n, rank = len(numbers), self._layout.rank
        with torch.autocast(numbers.device.type, enabled=False):
            parts = self._layout.split(numbers.float())
            down = _products({name: a.flatten(0, 1) for name, (a, _) in parts.items()}, self._down)
            up = _products({name: b.mT.flatten(0, 1) for name, (_, b) in parts.items()}, self._up)
        return {name: (down[name].view(n, rank, -1), up[name].view(n, rank, -1).mT) for name in parts}


def _stacked(matrices: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Returns the names of matrices of equal shape, and these matrices in one tensor."""
    return [(names, torch.stack([matrices[name] for name in names])) for names in alike(matrices)]


def _products(rows: Mapping[str, Tensor], stacked: list[tuple[list[str], Tensor]]) -> dict[str, Tensor]:
    """Returns each site's rows times its matrix."""
    made: dict[str, Tensor] = {}
    for names, matrices in stacked:
        products = torch.bmm(torch.stack([rows[name] for name in names]), matrices)
        made |= zip(names, products.unbind(), strict=True)
    return made


def start(layout: Layout, seed: int) -> Float[Tensor, " P"]:
    """Returns the point where every identity starts: random `A_train` and zero `B_train`, so `ΔW = 0`.

    A separate draw for each identity would be noise that no network can predict (training.md 1). With both
    factors at zero there would be no gradient (training.md 3). Rows of `A_train` have a norm of about 1.
    """
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for site in layout.sites:
        a, d = layout.dims(site)
        generator = rng(seed, site.name, "start")
        gauss = torch.randn(1, layout.rank, a, dtype=torch.float64, generator=generator) / a**0.5
        parts[site.name] = (gauss.to(torch.float32), torch.zeros(1, d, layout.rank))
    return layout.join(parts)[0]


def delta_products(layout: Layout, numbers: Numbers) -> dict[str, Float[Tensor, "n _d _a"]]:
    """Returns `B_train @ A_train` by site, which is ΔW in the coordinates of the aux bases (training.md 2).

    Distances between the products equal those between ΔW. They are float32 under any autocast.
    """
    with torch.autocast(numbers.device.type, enabled=False):
        return {name: b @ a for name, (a, b) in layout.split(numbers.float()).items()}
