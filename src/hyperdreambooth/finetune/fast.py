"""The fast finetune: an adapter, usually a prediction, relaxed and trained on photos (paper, 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.shots import ClassSampler, Photos, inputs_of, shots_of
from hyperdreambooth.finetune.train import check_loss, train
from hyperdreambooth.finetune.trainable import FactorLeaves, beside, each, hashed, pairs, together
from hyperdreambooth.lora.relax import fresh, relax, truncate
from hyperdreambooth.runs import Run
from hyperdreambooth.shapes import Factors, Site
from hyperdreambooth.sites import linear_sites


def finetune(
    base: Base,
    adapter: Adapter,
    photos: Photos,
    config: FinetuneConfig | None = None,
    *,
    out: Path | None = None,
    sample: ClassSampler | None = None,
) -> Adapter:
    """`finetune_many` of one person.

    Raises:
        InputError: as there, or the loss is no number any more.
    """
    made = finetune_many(base, [adapter], [photos], config, out=out, sample=sample)[0]
    check_loss(made.metadata)
    return made


def finetune_many(
    base: Base,
    adapters: Sequence[Adapter],
    people: Sequence[Photos],
    config: FinetuneConfig | None = None,
    *,
    out: Path | None = None,
    sample: ClassSampler | None = None,
) -> list[Adapter]:
    """Trains adapters on their persons' photos for a few steps (paper, section 4.3).

    Args:
        base: the base the adapters were made for.
        adapters: usually predictions; any LiDB or LoRA. All of one rank and of the same sites.
        people: photos of each person; one will do.
        config: steps, rank, way, …
        out: a run folder for log and checkpoints; None to keep everything in memory.
        sample: prompts, a seed for each → class images; for prior preservation.

    Returns:
        A LoRA of rank `config.rank` for each, worn by nothing.

    Raises:
        InputError: an adapter of another base, one whose rank leaves no room in `config.rank`, or `out` holds
            a run of another config, base, start or photos.
    """
    config = config or FinetuneConfig()
    trainable = _relaxed_or_beside(base, adapters, config)
    run = None
    if out is not None:
        begun = hashed([adapter.factors for adapter in adapters])
        run = Run(out, config, inputs={**inputs_of(base, people, config), "adapters": begun})
    groups, judged = shots_of(base, people, config, sample)
    outcome = train(base, trainable, groups, config, run, judged=judged)
    return [
        _finished(one, factors, config, outcome.metadata(k))
        for k, (one, factors) in enumerate(zip(adapters, each(trainable.worn()), strict=True))
    ]


def _finished(
    adapter: Adapter, factors: Factors, config: FinetuneConfig, outcome: Mapping[str, str]
) -> Adapter:
    """The trained factors in the adapter's place, of the rank that was asked for."""
    error = 0.0
    if next(iter(factors.values()))[0].shape[1] > config.rank:
        factors, error = truncate(factors, config.rank)
    facts = {**outcome, "way": config.way, "truncation_error": f"{error:.3g}"}
    return replace(adapter, factors=factors, lidb=None, metadata={**adapter.metadata, **facts})


def _relaxed_or_beside(base: Base, adapters: Sequence[Adapter], config: FinetuneConfig) -> FactorLeaves:
    """The two ways of docs/concepts.md; both are exact before the first step."""
    sites, highest = _fitting_sites(base, adapters), max(adapter.rank for adapter in adapters)
    if highest > config.rank:
        raise InputError(f"rank: expected at least {highest}, the adapter's own, got {config.rank}; raise it")
    if config.way == "complement":
        relaxed = [relax(adapter.factors, config.rank, config.seed) for adapter in adapters]
        return pairs(together(relaxed), base.device)
    free = config.trained_rank or config.rank - highest
    if free < 1:
        raise InputError(
            f"rank: {config.rank} leaves nothing beside the adapter's rank {highest}; raise it, or give "
            "trained_rank"
        )
    still = together([adapter.factors for adapter in adapters])
    return beside(still, together([fresh(sites, free, config.seed)] * len(adapters)), base.device)


def _fitting_sites(base: Base, adapters: Sequence[Adapter]) -> tuple[Site, ...]:
    """The base's sites that the adapters change.

    Raises:
        InputError: an adapter belongs to another base, or they do not change the same sites.
    """
    names = set(adapters[0].factors)
    sites = tuple(site for site in linear_sites(base.components) if site.name in names)
    for adapter in adapters:
        if adapter.base_fingerprint not in ("", base.fingerprint):
            raise InputError(
                f"adapter: made for base {adapter.base_fingerprint}, this base {base.source} is "
                f"{base.fingerprint}; load the base it was made for"
            )
        if odd := sorted(set(adapter.factors) - {site.name for site in sites}):
            raise InputError(
                f"adapter: {base.source} has no linear layer {odd[0]} ({len(odd)} such); load the base it "
                "was made for, or take an adapter without convolutions"
            )
        if set(adapter.factors) != names:
            raise InputError("adapters: expected all of the same sites; finetune those of other sites alone")
    return sites
