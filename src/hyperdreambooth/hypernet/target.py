"""The space of the predictions and what they are compared with: layout, bases, scale, a bank's people."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
_HELD = 2**28  # bytes of a bank that are held in memory; the rows of a larger one are read when they are used


@dataclass(frozen=True)
class Targets:
    """The space of the numbers, and the people of the bank."""

    layout: Layout
    basis: Basis  # the initial one if it is learned
    mean: Tensor  # `(P,)`, the numbers at θ = 0
    spread: Tensor  # `(P,)`, the scale of θ, the same for all numbers of a site
    rows: dict[int, int] = field(default_factory=dict[int, int])  # identity → its row among the bank's people
    read: Callable[[list[int]], Tensor] = lambda _: torch.empty(0)  # rows → `(k, P)`
    scale: Tensor = field(default_factory=lambda: torch.empty(0))  # `(s,)`, how much people differ
    digest: str = ""  # of all numbers of the bank's people

    def known(self, identities: Sequence[int]) -> Tensor:
        """Returns the bank's numbers `(k, P)` of identities that are in `rows`."""
        return self.read([self.rows[identity] for identity in identities])


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
            f"{bank.store}: expected people besides those held out, found none; let hdb preoptimize finish"
        )
    sums = _Sums(layout)
    parts = sums.watch(bank.blocks(ids))
    if config.learn_basis:
        for _ in parts:
            pass
        return Targets(layout, basis, *sums.statistics(config.spread))
    scale = bank_scale(layout, parts)
    mean, spread = sums.statistics(config.spread)
    row = {name: k for k, name in enumerate(ids)}
    rows = {k: row[name] for k, name in enumerate(names) if name in row}
    return Targets(layout, basis, mean, spread, rows, _reader(bank, ids), scale, sums.digest.hexdigest())


def _reader(bank: Bank, ids: Sequence[str]) -> Callable[[list[int]], Tensor]:
    """Returns what reads the rows of some people: from memory if all fit there, else from the bank."""
    if 4 * len(ids) * bank.layout.size <= _HELD:
        return bank.numbers(ids).__getitem__
    return lambda rows: bank.numbers([ids[row] for row in rows])


class _Sums:
    """What one pass over a bank's numbers gathers, in float64 and relative to the first person."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.count, self.digest = layout, 0, hashlib.sha256()
        self.first = self.sum = self.squares = torch.zeros(layout.size, dtype=torch.float64)

    def watch(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Adds up what passes, and hands it on in small parts."""
        for block in blocks:
            self.first = self.first if self.count else block[0].double()
            away = block.double() - self.first
            self.count += len(block)
            self.sum = self.sum + away.sum(0)
            self.squares = self.squares + away.square().sum(0)
            self.digest.update(block.numpy().tobytes())
            yield from block.split(_TOGETHER)

    def statistics(self, default: float) -> tuple[Tensor, Tensor]:
        """Returns the mean `(P,)` and each site's deviation `(P,)`; `default` where all people are equal."""
        mean = self.sum / self.count
        squares = (self.squares / self.count - mean.square()).clamp_min(0)
        sites = torch.stack([chunk.mean() for chunk in squares.split(self.layout.sizes)]).sqrt()
        sites = torch.where(sites > 0, sites, default)
        spread = sites.repeat_interleave(torch.tensor(self.layout.sizes))
        return (self.first + mean).float(), spread.float()


def _fitting_seed(base: Base, config: HypernetConfig, bank: Bank) -> int:
    """Returns the basis seed of a bank that fits base and config; others are refused."""
    if (made_for := bank.manifest["base_fingerprint"]) != base.fingerprint:
        raise InputError(
            f"{bank.store}: expected a bank of base {base.fingerprint} ({base.source}), got one of "
            f"{made_for}; use a bank of this base"
        )
    layout, seed = bank.layout, seed_of(str(bank.manifest["basis_source"]))
    if seed is None:
        raise InputError(
            f"{bank.store}: expected seeded bases, got {bank.manifest['basis_source']}; use another bank"
        )
    text = any(site.component != base.family.DENOISER for site in layout.sites)
    has = {"rank": layout.rank, "down_dim": layout.down_dim, "up_dim": layout.up_dim}
    has |= {"basis_seed": seed, "text_encoder": text}
    asked = ((name, getattr(config, name)) for name in has if name in config.model_fields_set)
    differing = [f"{name} is {has[name]}, the config has {v}" for name, v in asked if v != has[name]]
    if differing:
        raise InputError(f"{bank.store}: {'; '.join(differing)}; remove these settings, or use another bank")
    return seed
