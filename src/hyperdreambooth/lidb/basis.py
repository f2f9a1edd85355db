"""The frozen aux bases: `A_aux (a, i)` with orthonormal rows, `B_aux (o, d)` with orthonormal columns.

Paper, section 4.1: `ΔW = B_aux @ B_train @ A_train @ A_aux`, the aux matrices random, orthonormal and frozen.
They are regenerated from a seed and never stored (60 MB on the UNet of SD 1.5), so the same seed has to give
the same bits on every machine: float32 `qr` follows the thread count and float32 `randn` the CPU's
instruction set; a float64 draw and a float64 QR with fixed signs, cast at the end, follow neither.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Site

# a fingerprint sees changes of about 1e-3 of a unit vector, not the last bits of another LAPACK
_GRID = 1000.0


@dataclass
class Basis:
    """The aux bases of every site, and where they come from.

    Attributes:
        source: `seed:N` for bases drawn from a seed, `hypernet:FINGERPRINT` for learned ones.
        down: site name → `A_aux (a_site, i)`.
        up: site name → `B_aux (o, d_site)`.
    """

    source: str
    down: dict[str, Tensor]
    up: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Basis:
        """The same bases on another device, float32 as they are."""
        down = {name: matrix.to(device) for name, matrix in self.down.items()}
        return Basis(self.source, down, {name: matrix.to(device) for name, matrix in self.up.items()})


def site_dims(site: Site, down_dim: int, up_dim: int) -> tuple[int, int]:
    """`(a_site, d_site)`: the aux dims shrink where the layer itself is smaller."""
    return min(down_dim, site.in_features), min(up_dim, site.out_features)


def seeded_basis(
    sites: Sequence[Site], down_dim: int, up_dim: int, seed: int, device: torch.device | str = "cpu"
) -> Basis:
    """Draws the bases of all sites; each depends on the seed and its own site only, not on the other sites.

    Args:
        sites: the adapted layers.
        down_dim: `a`, shrunk to `i` at small sites.
        up_dim: `d`, shrunk to `o` at small sites.
        seed: names the draw; becomes the source `seed:N`.
        device: where the float32 result is put; the draw itself is always made on the CPU.

    Returns:
        Bases with orthonormal rows of `down` and orthonormal columns of `up`.
    """
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for site in sites:
        a, d = site_dims(site, down_dim, up_dim)
        rows = _orthonormal(site.in_features, a, (seed, site.name, "down")).T
        columns = _orthonormal(site.out_features, d, (seed, site.name, "up"))
        down[site.name], up[site.name] = rows.contiguous().to(device), columns.contiguous().to(device)
    return Basis(f"seed:{seed}", down, up)


def seed_of(source: str) -> int | None:
    """The seed of a `seed:N` source; None for learned bases, which only their hypernetwork folder holds."""
    match = re.fullmatch(r"seed:(-?\d{1,18})", source)
    return int(match.group(1)) if match else None


def basis_fingerprint(basis: Basis) -> str:
    """Sixteen hex digits of every matrix seen through one fixed random probe a side, rounded.

    Tolerant on purpose: bases that differ by rounding (another LAPACK, another device) are the same basis.
    """
    digest = hashlib.sha256()
    for side, matrices in (("down", basis.down), ("up", basis.up)):
        for name in sorted(matrices):
            rows, columns = matrices[name].shape
            digest.update(f"{side} {name} {rows} {columns} {_probe(matrices[name], name, side)}\n".encode())
    return digest.hexdigest()[:16]


def _orthonormal(rows: int, columns: int, key: tuple[int | str, ...]) -> Tensor:
    """`(rows, columns)` float32 with orthonormal columns, `rows >= columns`, uniform over such matrices."""
    gauss = torch.randn(rows, columns, dtype=torch.float64, generator=rng(*key))
    q, r = torch.linalg.qr(gauss)
    # LAPACK is free to choose the sign of each column; a positive diagonal of R makes the result unique
    signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(torch.float64)
    return (q * signs).to(torch.float32)


def _probe(matrix: Tensor, name: str, side: str) -> int:
    """`pᵀ M q` on the grid, p a unit vector, so about N(0, 1) before rounding whatever the matrix's size."""
    exact = matrix.detach().to("cpu", torch.float64)
    generator = rng("basis fingerprint", name, side)
    p = torch.randn(exact.shape[0], dtype=torch.float64, generator=generator)
    q = torch.randn(exact.shape[1], dtype=torch.float64, generator=generator)
    return round(float(p @ exact @ q / p.norm()) * _GRID)
