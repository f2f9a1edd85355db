"""What predictions are compared with and measured in: layout, bases, start, scale, and a bank's people."""

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
from hyperdreambooth.lidb.weights import Layout, balance, start
from hyperdreambooth.shapes import Site

_TOGETHER = 32  # people whose ΔW products are held at once


@dataclass(frozen=True)
class Targets:
    """The space of the numbers.

    Attributes:
        layout: where each site's numbers lie.
        basis: the aux bases (where they are learned: the first ones).
        mean: `(P,)`, what θ = 0 stands for.
        spread: `(P,)`, what θ = 1 stands for, one figure a site.
        numbers: `(k, P)` of the bank's people that are trained on.
        rows: identity → its row in `numbers`.
        scale: `(s,)`, how much people differ at each site.
    """

    layout: Layout
    basis: Basis
    mean: Tensor
    spread: Tensor
    numbers: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: dict[int, int] = field(default_factory=dict[int, int])
    scale: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def covered(self) -> list[int]:
        """The identities that have a row."""
        return list(self.rows)


def read_targets(
    base: Base, config: HypernetConfig, names: Sequence[str], held: Collection[int], bank: Bank | None
) -> Targets:
    """Start and scale, from a bank where there is one, and its people as targets.

    With learned bases a bank's numbers mean something else after the first step: then there are no targets.

    Args:
        base: whose sites are adapted.
        config: dims where there is no bank.
        names: all identities.
        held: those held out, never looked at.
        bank: may cover some of the identities, or be of other people.

    Raises:
        InputError: the bank is of another base, empty, or contradicts the config.
    """
    if bank is None:
        layout = Layout(_sites(base, config), config.rank, config.down_dim, config.up_dim)
        basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, config.basis_seed, base.device)
        return Targets(
            layout, basis, start(layout, config.basis_seed), torch.full((layout.size,), config.spread)
        )
    layout, seed = bank.layout, _fitting_seed(base, config, bank)
    basis = seeded_basis(layout.sites, layout.down_dim, layout.up_dim, seed, base.device)
    hidden = {names[k] for k in held}
    ids = [name for name in bank.identities if name not in hidden]
    if not ids:
        raise InputError(
            f"{bank.folder}: the bank holds nobody who is not held out; let hdb preoptimize finish first"
        )
    numbers = bank.numbers(ids)
    if config.weight_loss == "numbers":
        numbers = balance(layout, numbers, bank.start)
    mean, spread = _statistics(layout, numbers, config.spread)
    if config.learn_basis:
        return Targets(layout, basis, mean, spread)
    row = {name: k for k, name in enumerate(ids)}
    rows = {k: row[name] for k, name in enumerate(names) if name in row}
    return Targets(layout, basis, mean, spread, numbers, rows, bank_scale(layout, numbers.split(_TOGETHER)))


def _sites(base: Base, config: HypernetConfig) -> tuple[Site, ...]:
    """The base's sites, without the text encoder's where it is left alone."""
    return tuple(s for s in base.sites if config.text_encoder or s.component == base.family.DENOISER)


def _statistics(layout: Layout, numbers: Tensor, default: float) -> tuple[Tensor, Tensor]:
    """Mean `(P,)`, and the rms distance from it a site, repeated to `(P,)`; `default` if nobody differs."""
    mean = numbers.double().mean(0)
    squares = (numbers.double() - mean).square().mean(0)
    sites = torch.stack([chunk.mean() for chunk in squares.split(layout.sizes)]).sqrt()
    sites = torch.where(sites > 0, sites, default)
    return mean.float(), sites.repeat_interleave(torch.tensor(layout.sizes)).float()


def _fitting_seed(base: Base, config: HypernetConfig, bank: Bank) -> int:
    """The bank's basis seed, after checking that the bank fits the base and what the user asked for."""
    made_for = bank.manifest["base_fingerprint"]
    if made_for != base.fingerprint:
        raise InputError(
            f"{bank.folder}: a bank of base {made_for}, this base {base.source} is {base.fingerprint}; "
            "use a bank of this base"
        )
    layout, seed = bank.layout, seed_of(str(bank.manifest["basis_source"]))
    if seed is None:
        raise InputError(
            f"{bank.folder}: made over {bank.manifest['basis_source']}; a bank over a seed is expected"
        )
    text = any(site.component != base.family.DENOISER for site in layout.sites)
    has = {
        "rank": layout.rank, "down_dim": layout.down_dim, "up_dim": layout.up_dim, "basis_seed": seed,
        "text_encoder": text,
    }  # fmt: skip
    asked = {name: getattr(config, name) for name in has if name in config.model_fields_set}
    if differing := [
        f"{name} is {has[name]}, the config says {value}"
        for name, value in asked.items()
        if value != has[name]
    ]:
        raise InputError(
            f"{bank.folder}: {'; '.join(differing)}; leave these to the bank, or use another one"
        )
    return seed
