"""The space of the predictions and what they are compared with: layout, bases, scale, a bank's people."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.loss import bank_scale
from hyperdreambooth.lidb.bank import Bank
from hyperdreambooth.lidb.basis import Basis, seed_of, seeded_basis
from hyperdreambooth.lidb.weights import Layout, start

_TOGETHER = 32  # people whose ΔW products are in memory at once


@dataclass(frozen=True)
class Targets:
    """The space of the numbers, and the people of the bank."""

    layout: Layout
    basis: Basis  # the initial one if it is learned
    mean: Tensor  # `(P,)`, the numbers at θ = 0
    spread: Tensor  # `(P,)`, the scale of θ, the same for all numbers of a site
    numbers: Tensor = field(default_factory=lambda: torch.empty(0))  # `(k, P)` of the bank's trained people
    rows: dict[int, int] = field(default_factory=dict[int, int])  # identity → its row in `numbers`
    scale: Tensor = field(default_factory=lambda: torch.empty(0))  # `(s,)`, how much people differ


def read_targets(
    base: Base, config: HypernetConfig, names: Sequence[str], held: Collection[int], bank: Bank | None
) -> Targets:
    """Reads start, scale and people from a bank, or takes start and scale from the config.

    If the bases are learned, a bank's numbers lose their meaning with the first step, so its people are no
    targets. Of all identities, `names`, those held out are never looked at.
    """
    if bank is None:
        sites = (s for s in base.sites if config.text_encoder or s.component == base.family.DENOISER)
        layout = Layout(tuple(sites), config.rank, config.down_dim, config.up_dim)
        basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, config.basis_seed, base.device)
        mean = start(layout, config.basis_seed)
        return Targets(layout, basis, mean, torch.full((layout.size,), config.spread))
    layout, seed = bank.layout, _fitting_seed(base, config, bank)
    basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, seed, base.device)
    hidden = {names[k] for k in held}
    ids = [name for name in bank.identities if name not in hidden]
    if not ids:
        raise InputError(
            f"{bank.folder}: expected people besides those held out, found none; let hdb preoptimize finish"
        )
    numbers = bank.numbers(ids)
    mean, spread = _statistics(layout, numbers, config.spread)
    if config.learn_basis:
        return Targets(layout, basis, mean, spread)
    row = {name: k for k, name in enumerate(ids)}
    rows = {k: row[name] for k, name in enumerate(names) if name in row}
    return Targets(layout, basis, mean, spread, numbers, rows, bank_scale(layout, numbers.split(_TOGETHER)))


def _statistics(layout: Layout, numbers: Tensor, default: float) -> tuple[Tensor, Tensor]:
    """Returns the mean `(P,)` and each site's deviation `(P,)`; `default` where all people are equal."""
    mean = numbers.double().mean(0)
    squares = (numbers.double() - mean).square().mean(0)
    sites = torch.stack([chunk.mean() for chunk in squares.split(layout.sizes)]).sqrt()
    sites = torch.where(sites > 0, sites, default)
    return mean.float(), sites.repeat_interleave(torch.tensor(layout.sizes)).float()


def _fitting_seed(base: Base, config: HypernetConfig, bank: Bank) -> int:
    """Returns the basis seed of a bank that fits base and config; others are refused."""
    if (made_for := bank.manifest["base_fingerprint"]) != base.fingerprint:
        raise InputError(
            f"{bank.folder}: expected a bank of base {base.fingerprint} ({base.source}), got one of "
            f"{made_for}; use a bank of this base"
        )
    layout, seed = bank.layout, seed_of(str(bank.manifest["basis_source"]))
    if seed is None:
        raise InputError(
            f"{bank.folder}: expected seeded bases, got {bank.manifest['basis_source']}; use another bank"
        )
    text = any(site.component != base.family.DENOISER for site in layout.sites)
    has = {"rank": layout.rank, "down_dim": layout.down_dim, "up_dim": layout.up_dim}
    has |= {"basis_seed": seed, "text_encoder": text}
    asked = ((name, getattr(config, name)) for name in has if name in config.model_fields_set)
    differing = [f"{name} is {has[name]}, the config has {v}" for name, v in asked if v != has[name]]
    if differing:
        raise InputError(f"{bank.folder}: {'; '.join(differing)}; remove these settings, or use another bank")
    return seed
