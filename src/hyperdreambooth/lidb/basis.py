"""The frozen aux bases: `A_aux (a, i)` with orthonormal rows, `B_aux (o, d)` with orthonormal columns.

Paper, section 4.1: `ΔW = B_aux @ B_train @ A_train @ A_aux`. The aux matrices are drawn again from a seed and
never stored, so the same seed must give the same bits on every machine. In float32 `qr` depends on the number
of threads and `randn` on the CPU's instruction set. In float64, cast at the end, neither matters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Site

# a fingerprint sees changes of about 1e-3 of a unit vector, but not the last bits of another LAPACK
_GRID = 1000.0


@dataclass(frozen=True)
class Basis:
    """The aux bases of every site; seeded ones are shared within a process: never write into them."""

    source: str  # `seed:N` for bases drawn from a seed, `hypernet:FINGERPRINT` for learned ones
    down: dict[str, Tensor]  # site name → `A_aux (a_site, i)`
    up: dict[str, Tensor]  # site name → `B_aux (o, d_site)`

    def to(self, device: torch.device | str) -> Basis:
        """Returns the bases on a device, where they share the matrices that are there already."""
        return self.mapped(lambda matrix: matrix.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Basis:
        """Returns the bases with every matrix changed."""
        down = {name: change(matrix) for name, matrix in self.down.items()}
        return Basis(self.source, down, {name: change(matrix) for name, matrix in self.up.items()})


def site_dims(site: Site, down_dim: int, up_dim: int) -> tuple[int, int]:
    """Returns `(a_site, d_site)`: the aux dims shrink where the layer itself is smaller."""
    return min(down_dim, site.in_features), min(up_dim, site.out_features)


def seeded_basis(
    sites: Sequence[Site], down_dim: int, up_dim: int, seed: int, device: torch.device | str = "cpu"
) -> Basis:
    """Draws the float32 bases of all sites on the CPU, once in a process, and puts them on a device.

    The bases of a site do not depend on the other sites. Their source is `seed:N`.
    """
    return _draw(tuple(sites), down_dim, up_dim, seed).to(device)


@lru_cache(maxsize=4)  # bases of SD 1.5 take 60 MB and 2.7 s
def _draw(sites: tuple[Site, ...], down_dim: int, up_dim: int, seed: int) -> Basis:
    basis = Basis(f"seed:{seed}", {}, {})
    for site in sites:
        a, d = site_dims(site, down_dim, up_dim)
        basis.down[site.name] = _orthonormal(site.in_features, a, (seed, site.name, "down")).T.contiguous()
        basis.up[site.name] = _orthonormal(site.out_features, d, (seed, site.name, "up")).contiguous()
    return basis


def seed_of(source: str) -> int | None:
    """Returns the seed of a `seed:N` source; None for learned bases, which only their hypernetwork has."""
    match = re.fullmatch(r"seed:(-?\d{1,18})", source)
    return int(match.group(1)) if match else None


def basis_fingerprint(basis: Basis) -> str:
    """Returns sixteen hex digits of all matrices, each multiplied by a fixed random vector on both sides.

    The products are rounded, so that bases of another LAPACK or device have the same fingerprint.
    """
    digest = hashlib.sha256()
    for side, matrices in (("down", basis.down), ("up", basis.up)):
        for name in sorted(matrices):
            rows, columns = matrices[name].shape
            digest.update(f"{side} {name} {rows} {columns} {_probe(matrices[name], name, side)}\n".encode())
    return digest.hexdigest()[:16]


def _orthonormal(rows: int, columns: int, key: tuple[int | str, ...]) -> Tensor:
    """Draws a float32 matrix with orthonormal columns, uniformly; `rows >= columns`."""
    gauss = torch.randn(rows, columns, dtype=torch.float64, generator=rng(*key))
    q, r = torch.linalg.qr(gauss)
    # LAPACK may choose the sign of each column; a positive diagonal of R makes the result unique
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(torch.float64)
    return (q * signs).to(torch.float32)


def _probe(matrix: Tensor, name: str, side: str) -> int:
    """Returns `pᵀ M q` on the grid; p is a unit vector, so the product is about N(0, 1) for any size."""
    exact = matrix.detach().to("cpu", torch.float64)
    generator = rng("basis fingerprint", name, side)
    p = torch.randn(exact.shape[0], dtype=torch.float64, generator=generator)
    q = torch.randn(exact.shape[1], dtype=torch.float64, generator=generator)
    return round(float(p @ exact @ q / p.norm()) * _GRID)
