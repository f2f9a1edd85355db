"""Changing the rank of an adapter without changing ΔW (paper, section 4.3, "rank-relaxed").

Padding *both* factors with zeros leaves rows and columns that never receive a gradient. Two ways are exact at
step 0 and trainable everywhere: `relax` fills the spare rows of `down` with an orthonormal complement;
`concatenate` puts a trainable LoRA beside the frozen one, and `truncate` merges both after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hyperdreambooth.files import InputError
from hyperdreambooth.runs import rng
from hyperdreambooth.shapes import Down, Factors, Site, Up

NEGLIGIBLE = 1e-6  # relative to the largest singular value; float32 factors cannot tell it from zero


def thin_svd(
    down: Down, up: Up
) -> tuple[Float[Tensor, "n o k"], Float[Tensor, "n k"], Float[Tensor, "n k i"]]:
    """Returns the SVD of `up @ down` from two thin QR decompositions, in float64 on the CPU.

    That is `U (n, o, k)`, `S (n, k)` in descending order and `Vh (n, k, i)`, `k = min(r, o, i)`, in format
    and device like `down`. Columns of `U` and rows of `Vh` are orthonormal even where `S` is zero. `S` is NaN
    for an identity whose factors are not finite. The full `(o, i)` matrix is never formed.
    """
    left, left_core = torch.linalg.qr(up.double().cpu())
    right, right_core = torch.linalg.qr(down.double().cpu().mT)
    core = left_core @ right_core.mT
    whole = core.isfinite().all(2).all(1)[:, None]  # LAPACK would stop for all at one NaN
    u, s, vh = torch.linalg.svd(core.where(whole[..., None], 0), full_matrices=False)
    s = s.where(whole, torch.nan)
    return (left @ u).to(down), s.to(down), (vh @ right.mT).to(down)


def inner_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Returns `⟨ΔW, ΔW'⟩ = ⟨upᵀ up', down down'ᵀ⟩` of one identity at one site, in float64."""
    (down, up), (down2, up2) = ([half[0].detach().double().cpu() for half in pair] for pair in (one, other))
    return float(((up.T @ up2) * (down @ down2.T)).sum())


def norm(pair: tuple[Tensor, Tensor]) -> float:
    """Returns `‖ΔW‖` of one identity at one site, computed in float64."""
    return max(inner_product(pair, pair), 0.0) ** 0.5


def relative_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Returns `‖ΔW − ΔW'‖ / ‖ΔW‖` of one identity at one site, to about 1e-8; 0 if both are zero."""
    size = inner_product(one, one)
    apart = size + inner_product(other, other) - 2 * inner_product(one, other)
    return (max(apart, 0.0) / size) ** 0.5 if size else float(apart > 0)


@torch.no_grad()
def relax(factors: Factors, rank: int, seed: int = 0) -> Factors:
    """Raises the rank to `rank`: `up = [U S | 0]`, `down = [Vh ; orthonormal complement]`. ΔW stays the same.

    A site whose in_features are fewer than `rank` has no further directions: there, and only there, both
    factors are padded with zeros, because files need one rank for all sites. `seed` names the generator of
    the complement; formats and devices stay those of the factors, which are detached. A ΔW of a higher rank
    is refused.
    """
    return {site: _relax_site(down, up, rank, f"{seed}/{site}") for site, (down, up) in factors.items()}


def _relax_site(
    down: Down, up: Up, rank: int, key: str
) -> tuple[Float[Tensor, "n rank i"], Float[Tensor, "n o rank"]]:
    u, s, vh = thin_svd(down.double().cpu(), up.double().cpu())
    needed = int((s > NEGLIGIBLE * s[:, :1]).sum(1).max())
    if needed > rank:
        raise ValueError(f"{key.partition('/')[2]}: rank {needed} does not fit into {rank}; use truncate")
    kept = min(rank, s.shape[1])
    rows = _complement(vh[:, :kept], rank, key)
    return rows.to(down), _pad((u * s[:, None])[..., :kept], rank).to(up)


def _complement(rows: Float[Tensor, "n k i"], rank: int, key: str) -> Float[Tensor, "n rank i"]:
    """Extends orthonormal rows to `(n, rank, i)` by random orthonormal ones, and by zeros after the i-th."""
    n, k, i = rows.shape
    spare = max(min(rank, i) - k, 0)
    noise = torch.randn(n, i, spare, dtype=torch.float64, generator=rng("relax", key))
    basis = torch.linalg.qr(torch.cat([rows.mT, noise], 2))[0].mT
    return _pad(torch.cat([rows, basis[:, k:]], 1).mT, rank).mT


def _pad(columns: Float[Tensor, "n o k"], rank: int) -> Float[Tensor, "n o rank"]:
    """Appends zero columns: `(n, o, k)` → `(n, o, rank)`."""
    return torch.nn.functional.pad(columns, (0, rank - columns.shape[-1]))


def fresh(sites: Sequence[Site], rank: int, seed: int = 0) -> Factors:
    """Returns a LoRA to train from scratch: one identity, random `down` rows of norm about 1, `up` zero."""
    made: Factors = {}
    for site in sites:
        rows = torch.randn(1, rank, site.in_features, generator=rng("fresh", seed, site.name))
        made[site.name] = rows / site.in_features**0.5, torch.zeros(1, site.out_features, rank)
    return made


def concatenate(a: Factors, b: Factors) -> Factors:
    """Joins two adapters of the same sites and identities: ΔW is the sum, and gradients flow to both.

    Down `(n, r_a, i)` and `(n, r_b, i)` become `(n, r_a + r_b, i)`; detach one to freeze it.
    """
    if a.keys() != b.keys():
        raise ValueError(f"expected two adapters of the same sites; only one has {min(a.keys() ^ b.keys())}")
    return {s: (torch.cat([a[s][0], b[s][0]], 1), torch.cat([a[s][1], b[s][1]], 2)) for s in a}


def add_up(many: Sequence[Factors]) -> Factors:
    """Joins adapters of the same identities to one whose ΔW is exactly their sum, at all of their sites.

    At every site its rank is the sum of their ranks there.

    Raises:
        InputError: two layers of one name and different sizes.
    """
    made: Factors = {}
    for site in sorted({site for factors in many for site in factors}):
        pairs = [factors[site] for factors in many if site in factors]
        if len(sizes := list(dict.fromkeys((down.shape[2], up.shape[1]) for down, up in pairs))) > 1:
            one, other = (f"{i} → {o}" for i, o in sizes[:2])
            what = f"{site} is {one} in one and {other} in the other"
            raise InputError(f"adapters of two bases cannot be added: {what}")
        made[site] = torch.cat([down for down, _ in pairs], 1), torch.cat([up for _, up in pairs], 2)
    return made


def padded(many: Sequence[Factors]) -> dict[str, tuple[Tensor, Tensor]]:
    """Lays adapters of one identity each side by side, zero where one has no such site, or a smaller rank.

    The outcome is down `(n, r, i)`, up `(n, o, r)` at the sites of any of them, `r` their largest rank.
    """
    shapes = {site: pair for factors in many for site, pair in factors.items()}
    rank = max(down.shape[1] for factors in many for down, _ in factors.values())
    made: Factors = {}
    for site, (down, up) in shapes.items():
        nothing = down.new_zeros(1, 0, down.shape[2]), up.new_zeros(1, up.shape[1], 0)
        downs, ups = zip(*(factors.get(site, nothing) for factors in many), strict=True)
        made[site] = torch.cat([_pad(d.mT, rank).mT for d in downs]), torch.cat([_pad(u, rank) for u in ups])
    return made


def scaled(factors: Factors, weight: float) -> Factors:
    """Returns ΔW times a weight, multiplied into `up`, so that a forward pass costs no more."""
    return {name: (down, up * weight) for name, (down, up) in factors.items()}


@torch.no_grad()
def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Returns the best adapter of a given rank, with singular values absorbed into `up` (paper, section 4.3).

    The second value is the relative error `‖ΔW − ΔW'‖ / ‖ΔW‖` over all sites and identities. Sites of smaller
    rank are zero-padded.
    """
    kept: Factors = {}
    lost = total = 0.0
    for site, (down, up) in factors.items():
        u, s, vh = thin_svd(down.double().cpu(), up.double().cpu())
        lost += float(s[:, rank:].square().sum())
        total += float(s.square().sum())
        rows, columns = vh[:, :rank].mT, (u * s[:, None])[..., :rank]
        kept[site] = _pad(rows, rank).mT.to(down), _pad(columns, rank).to(up)
    return kept, (lost / total) ** 0.5 if total else 0.0


def check_rank(rank: int, factors: Factors) -> None:
    """Refuses a rank that a LoRA file of these sites cannot have: readers take it for damage.

    Raises:
        InputError: one line with the limit.
    """
    limit, site = min((down.shape[2] + up.shape[1], name) for name, (down, up) in factors.items())
    if not 1 <= rank <= limit:
        raise InputError(f"rank {rank}: expected 1 to {limit}, the inputs and outputs of {site} together")
