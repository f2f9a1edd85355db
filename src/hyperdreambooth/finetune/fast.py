"""The fast finetune: an adapter, usually a prediction, relaxed and trained on photos (paper, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hyperdreambooth.adapter import Adapter, check_wearable
from hyperdreambooth.base.alone import alone
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photos, read_person
from hyperdreambooth.files import InputError
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.lora.relax import fresh, padded, relax, truncate
from hyperdreambooth.runs import Run
from hyperdreambooth.shapes import Factors, Site
from hyperdreambooth.sites import linear_sites
from hyperdreambooth.training.class_images import class_shots
from hyperdreambooth.training.looks import Look
from hyperdreambooth.training.loop import Callback, check_loss, train
from hyperdreambooth.training.shots import inputs_of, shots_of
from hyperdreambooth.training.trainable import FactorLeaves, beside, each, hashed, pairs
from hyperdreambooth.training.warm import Warm


def finetune_adapter(
    base: Base,
    adapter: Adapter,
    photos: Photos,
    config: FinetuneConfig | None = None,
    *,
    out: str | Path | None = None,
    callback: Callback | None = None,
    look: Look | None = None,
) -> Adapter:
    """Trains an adapter on its person's photos for a few steps (paper, section 4.3).

    With `way="complement"`, a LoRA that has `config.rank` already and no dead slot is trained as it is; every
    other adapter is relaxed first.

    Args:
        base: the base that the adapter was made for.
        adapter: usually a prediction, but any LiDB or LoRA will do.
        photos: the photos of the person; one is enough.
        config: steps, rank, way, …
        out: a run folder for the log and checkpoints; None to keep everything in memory.
        callback: called after every step with its number and the loss; False ends the training.
        look: looks at pictures while it trains; the number of steps must then be fixed.

    Returns:
        A LoRA of rank `config.rank`.

    Raises:
        InputError: an adapter of another base, one whose rank does not fit in `config.rank`, a run folder of
            another config, base, start or photos, or a loss that is not finite at the end.
    """
    options: dict[str, Any] = {"out": out, "callback": callback, "look": look}
    made = finetune_adapters(base, [adapter], [photos], config, **options)[0]
    check_loss(made.metadata)
    return made


@alone
def finetune_adapters(
    base: Base,
    adapters: Sequence[Adapter],
    people: Sequence[Photos],
    config: FinetuneConfig | None = None,
    *,
    out: str | Path | None = None,
    callback: Callback | None = None,
    look: Look | None = None,
    warm: Warm | None = None,
) -> list[Adapter]:
    """Trains several adapters of the same sites as `finetune_adapter` trains one, side by side.

    A loss that is not finite ends nobody else's training, and nothing is raised: `metadata["loss"]` says so.
    `warm` keeps the step that a GPU has recorded, for the next people.
    """
    config, photos = config or FinetuneConfig(), [read_person(one) for one in people]
    trainable = _relaxed_or_beside(base, adapters, config)
    run = None
    if out is not None:
        start = hashed([adapter.factors for adapter in adapters])
        run = Run(Path(out), config, inputs={**inputs_of(base, photos, config), "adapters": start})
    shots, judged = shots_of(base, photos, config, class_shots(base, config))
    options: dict[str, Any] = {"judged": judged, "callback": callback, "look": look, "warm": warm}
    outcome = train(base, trainable, shots, config, run, **options)
    return [
        _finished(base, one, factors, config, outcome.metadata(k))
        for k, (one, factors) in enumerate(zip(adapters, each(trainable.worn()), strict=True))
    ]


def _finished(
    base: Base, adapter: Adapter, factors: Factors, config: FinetuneConfig, outcome: Mapping[str, str]
) -> Adapter:
    """Returns the adapter with its trained factors, truncated to `config.rank` where they have more."""
    error = 0.0
    if next(iter(factors.values()))[0].shape[1] > config.rank:
        factors, error = truncate(factors, config.rank)
    metadata = {**adapter.metadata, **outcome, "way": config.way, "truncation_error": f"{error:.3g}"}
    origin = {"base_fingerprint": base.fingerprint, "base_source": base.source, "resolution": base.resolution}
    return replace(adapter, factors=factors, lidb=None, metadata=metadata, **origin)


def _relaxed_or_beside(base: Base, adapters: Sequence[Adapter], config: FinetuneConfig) -> FactorLeaves:
    """Starts from the adapters in one of the two ways of docs/concepts.md; both keep ΔW at step 0."""
    sites, highest = _fitting_sites(base, adapters), max(adapter.rank for adapter in adapters)
    if highest > config.rank:
        raise InputError(f"rank: expected at least {highest}, the adapter's own, got {config.rank}; raise it")
    if config.way == "complement":
        starts = [
            one.factors if _is_relaxed(one, config.rank) else relax(one.factors, config.rank, config.seed)
            for one in adapters
        ]
        return pairs(padded(starts), base.device)
    free = config.trained_rank or config.rank - highest
    if free < 1:
        raise InputError(
            f"rank: {config.rank} leaves no room beside the adapter's rank {highest}; raise it, or set "
            "trained_rank"
        )
    frozen = padded([adapter.factors for adapter in adapters])
    return beside(frozen, padded([fresh(sites, free, config.seed)] * len(adapters)), base.device)


def _is_relaxed(adapter: Adapter, rank: int) -> bool:
    """Returns whether an adapter is a LoRA of this rank in which every slot gets gradients."""
    return adapter.kind == "lora" and all(
        down.shape[1] == rank and bool((down.any(2) | up.any(1)).all())
        for down, up in adapter.factors.values()
    )


def _fitting_sites(base: Base, adapters: Sequence[Adapter]) -> tuple[Site, ...]:
    """Returns the sites of the base that the adapters change.

    Raises:
        InputError: an adapter belongs to another base, or the adapters do not change the same sites.
    """
    names = set(adapters[0].factors)
    sites = tuple(site for site in linear_sites(base.components) if site.name in names)
    check_wearable(base, *adapters)
    for adapter in adapters:
        if odd := sorted(set(adapter.factors) - {site.name for site in sites}):
            raise InputError(
                f"adapter: {base.source} has no linear layer {odd[0]} ({len(odd)} missing); load the base "
                "that the adapter was made for, or take an adapter without convolutions"
            )
        if set(adapter.factors) != names:
            raise InputError(
                "adapters: expected adapters of the same sites; finetune those of other sites separately"
            )
    return sites
