"""DreamBooth from scratch (paper, section 4.1): the baselines that the hypernetwork has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.shots import Sample
from hyperdreambooth.finetune.train import Photos, photos_fingerprint, shots_of, train
from hyperdreambooth.finetune.trainable import Trainable, each, leaf, pairs, together
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout, factors, start
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.runs import Run

Learn: TypeAlias = Callable[[Trainable], object]


def dreambooth(
    base: Base,
    photos: Photos,
    out: Path,
    config: DreamboothConfig | None = None,
    *,
    sample: Sample | None = None,
) -> Adapter:
    """`dreambooth_many` of one person."""
    return dreambooth_many(base, [photos], out, config, sample=sample)[0]


def dreambooth_many(
    base: Base,
    people: Sequence[Photos],
    out: Path,
    config: DreamboothConfig | None = None,
    *,
    sample: Sample | None = None,
) -> list[Adapter]:
    """Trains people from scratch, side by side (paper, section 4.1); running it again resumes.

    Args:
        base: the frozen base.
        people: photos of each person.
        out: run folder: log, checkpoints, class images.
        config: method, steps, rank, …
        sample: prompts, a seed for each → class images; for prior preservation.

    Returns:
        A LiDB or a LoRA for each, as `config.method` says.

    Raises:
        InputError: `out` holds a run of another config, base or photos.
    """
    config = config or DreamboothConfig()
    run = Run(out, config, inputs={"base": base.fingerprint, "photos": photos_fingerprint(people)})
    groups = shots_of(base, people, config, sample, out / "class")
    learn = partial(train, base, people=groups, config=config, run=run, title="dreambooth")
    return (_light if config.method == "lidb" else _lora)(base, len(people), config, learn)


def _lora(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[Adapter]:
    """An ordinary LoRA at every site."""
    trainable = pairs(together([fresh(base.sites, config.rank, config.seed)] * people), base.device)
    learn(trainable)
    return [Adapter(one, base.trigger, base.fingerprint, base.source) for one in each(trainable.worn())]


def _light(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[Adapter]:
    """Lightweight DreamBooth: numbers over frozen seeded bases, from the start that a bank's people share."""
    layout = Layout(base.sites, config.rank, config.down_dim, config.up_dim)
    basis = seeded_basis(base.sites, config.down_dim, config.up_dim, config.basis_seed)
    near, numbers = basis.to(base.device), leaf(start(layout, config.seed).repeat(people, 1), base.device)
    learn(Trainable({"numbers": numbers}, lambda now: factors(layout, near, now["numbers"])))
    made = partial(
        Lidb,
        layout=layout,
        basis_source=basis.source,
        basis_fingerprint=basis_fingerprint(basis),
        base_fingerprint=base.fingerprint,
        trigger=base.trigger,
        base_source=base.source,
    )
    return [Adapter.from_lidb(made(numbers=row), basis) for row in numbers.detach().cpu()]
