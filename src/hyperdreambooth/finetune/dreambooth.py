"""DreamBooth from scratch (paper, section 4.1): the baselines that the hypernetwork has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from hyperdreambooth.adapter import Adapter, check_rank
from hyperdreambooth.base.load import Base
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.shots import ClassSampler, Photos, inputs_of, shots_of
from hyperdreambooth.finetune.train import Outcome, check_loss, train
from hyperdreambooth.finetune.trainable import FactorLeaves, Trainable, each, leaf, pairs, together
from hyperdreambooth.finetune.whole import Whole
from hyperdreambooth.finetune.word import Word, Words
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout, factors, start
from hyperdreambooth.lora.relax import fresh
from hyperdreambooth.runs import Run

Learn: TypeAlias = Callable[[Trainable], Outcome]

TrainedPerson: TypeAlias = Adapter | Whole | Word
"""What a training from scratch makes of one person: `full` weights of the base, a word, else an adapter."""


def dreambooth(
    base: Base,
    photos: Photos,
    out: Path | None = None,
    config: DreamboothConfig | None = None,
    *,
    sample: ClassSampler | None = None,
) -> TrainedPerson:
    """`dreambooth_many` of one person.

    Raises:
        InputError: as there, or the loss is no number any more.
    """
    made = dreambooth_many(base, [photos], out, config, sample=sample)[0]
    check_loss(made.metadata)
    return made


def dreambooth_many(
    base: Base,
    people: Sequence[Photos],
    out: Path | None = None,
    config: DreamboothConfig | None = None,
    *,
    sample: ClassSampler | None = None,
) -> list[TrainedPerson]:
    """Trains people from scratch, side by side (paper, section 4.1); running it again resumes.

    Args:
        base: the frozen base.
        people: photos of each person; of one, where the method is `full`.
        out: run folder: log, checkpoints; None for a training that is not kept.
        config: method, steps, rank, …
        sample: prompts, a seed for each → class images; for prior preservation.

    Returns:
        A person each, as `config.method` says.

    Raises:
        InputError: `out` holds a run of another config, base or photos, or of the same otherwise captioned;
            or a LoRA's rank that no file can have.
    """
    config = config or DreamboothConfig()
    if config.method == "lora":  # checked before there is a run folder, which would be of this rank
        check_rank(config.rank, fresh(base.sites, rank=1))
    run = Run(out, config, inputs=inputs_of(base, people, config)) if out is not None else None
    groups, judged = shots_of(base, people, config, sample)
    learn = partial(train, base, people=groups, config=config, run=run, title=config.method, judged=judged)
    return _WAYS[config.method](base, len(people), config, learn)


def _lora(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """An ordinary LoRA at every site."""
    trainable = pairs(together([fresh(base.sites, config.rank, config.seed)] * people), base.device)
    outcome = learn(trainable)
    return [
        Adapter(one, base.trigger, base.fingerprint, base.source, metadata=outcome.metadata(k))
        for k, one in enumerate(each(trainable.worn()))
    ]


def _light(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """Lightweight DreamBooth: numbers over frozen seeded bases, from the start that a bank's people share."""
    layout = Layout(base.sites, config.rank, config.down_dim, config.up_dim)
    basis = seeded_basis(base.sites, config.down_dim, config.up_dim, config.basis_seed)
    near, numbers = basis.to(base.device), leaf(start(layout, config.seed).repeat(people, 1), base.device)
    outcome = learn(FactorLeaves({"numbers": numbers}, lambda now: factors(layout, near, now["numbers"])))
    made = partial(
        Lidb,
        layout=layout,
        basis_source=basis.source,
        basis_fingerprint=basis_fingerprint(basis),
        base_fingerprint=base.fingerprint,
        trigger=base.trigger,
        base_source=base.source,
    )
    done = [Adapter.from_lidb(made(numbers=row), basis) for row in numbers.detach().cpu()]
    return [replace(one, metadata=outcome.metadata(k)) for k, one in enumerate(done)]


def _full(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """All of the base's own weights."""
    if people != 1:
        raise ValueError(f"full DreamBooth trains one person at a time, got {people}")
    whole = Whole(base, config.text_encoder)
    whole.metadata = learn(whole).metadata(0)
    return [whole]


def _inversion(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """The vector of one word each."""
    words = Words(base, people)
    outcome = learn(words)
    return [replace(word, metadata=outcome.metadata(k)) for k, word in enumerate(words.each())]


_WAYS: dict[str, Callable[[Base, int, DreamboothConfig, Learn], list[TrainedPerson]]] = {
    "lidb": _light,
    "lora": _lora,
    "full": _full,
    "textual-inversion": _inversion,
}
