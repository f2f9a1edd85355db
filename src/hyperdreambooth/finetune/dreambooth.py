"""DreamBooth from scratch (paper, section 4.1): the baselines that the hypernetwork has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from hyperdreambooth.adapter import Adapter, check_rank, family_name
from hyperdreambooth.base.alone import alone
from hyperdreambooth.base.load import Base
from hyperdreambooth.faces.dataset import Photos, read_person
from hyperdreambooth.finetune.config import DreamboothConfig
from hyperdreambooth.finetune.whole import Whole
from hyperdreambooth.finetune.word import Word, Words
from hyperdreambooth.lidb.basis import basis_fingerprint, seeded_basis
from hyperdreambooth.lidb.file import Lidb
from hyperdreambooth.lidb.weights import Layout, start
from hyperdreambooth.lora.relax import fresh, padded
from hyperdreambooth.runs import Run
from hyperdreambooth.training.class_images import class_shots
from hyperdreambooth.training.looks import Look
from hyperdreambooth.training.loop import Callback, Outcome, check_loss, train
from hyperdreambooth.training.shots import inputs_of, shots_of
from hyperdreambooth.training.trainable import Trainable, each, numbers_of, pairs

Learn: TypeAlias = Callable[[Trainable], Outcome]

TrainedPerson: TypeAlias = Adapter | Whole | Word
"""What a training from scratch makes of one person: an adapter, the base's weights (`full`) or a word."""


def dreambooth(
    base: Base,
    photos: Photos,
    out: str | Path | None = None,
    config: DreamboothConfig | None = None,
    *,
    callback: Callback | None = None,
    look: Look | None = None,
) -> TrainedPerson:
    """Trains one person from scratch (paper, section 4.1); the same call resumes.

    Args:
        base: the frozen base.
        photos: the photos of the person.
        out: a run folder for the log and checkpoints; None to keep everything in memory.
        config: method, steps, rank, …
        callback: called after every step with its number and the loss; False ends the training.
        look: looks at pictures while it trains; the number of steps must then be fixed.

    Returns:
        An `Adapter`, except that `full` gives weights of the base and `textual-inversion` a word.

    Raises:
        InputError: a run folder of another config, base, photos or captions, a rank that no file can have, or
            a loss that is not finite at the end.
    """
    made = dreambooth_many(base, [photos], out, config, callback=callback, look=look)[0]
    check_loss(made.metadata)
    return made


@alone
def dreambooth_many(
    base: Base,
    people: Sequence[Photos],
    out: str | Path | None = None,
    config: DreamboothConfig | None = None,
    *,
    callback: Callback | None = None,
    look: Look | None = None,
) -> list[TrainedPerson]:
    """Trains several people as `dreambooth` trains one, side by side; `full` trains one at a time.

    A loss that is not finite ends nobody else's training, and nothing is raised: `metadata["loss"]` says so.
    """
    config, photos = config or DreamboothConfig(), [read_person(one) for one in people]
    if config.method == "lora":  # before the run folder exists, which would be bound to this rank
        check_rank(config.rank, fresh(base.sites, rank=1))
    run = None if out is None else Run(Path(out), config, inputs=inputs_of(base, photos, config))
    shots, judged = shots_of(base, photos, config, class_shots(base, config))

    def learn(trainable: Trainable) -> Outcome:
        return train(
            base, trainable, shots, config, run,
            title=config.method, judged=judged, callback=callback, look=look,
        )  # fmt: skip

    return _METHODS[config.method](base, len(people), config, learn)


def _lora(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """Trains an ordinary LoRA at every site."""
    trainable = pairs(padded([fresh(base.sites, config.rank, config.seed)] * people), base.device)
    outcome = learn(trainable)
    return [
        Adapter.made_on(base, one, metadata=outcome.metadata(k))
        for k, one in enumerate(each(trainable.worn()))
    ]


def _light(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """Trains numbers over frozen seeded bases, from the start that the people of a bank share."""
    layout = Layout(base.sites, config.rank, config.down_dim, config.up_dim)
    basis = seeded_basis(base.sites, config.down_dim, config.up_dim, config.basis_seed)
    trainable = numbers_of(layout, basis.to(base.device), start(layout, config.seed), people, base.device)
    outcome, digest = learn(trainable), basis_fingerprint(basis)
    origin = (base.fingerprint, base.trigger, base.source, base.resolution)
    done = [
        Adapter.from_lidb(Lidb(row, layout, basis.source, digest, *origin), basis, family_name(base))
        for row in trainable.leaves["numbers"].detach().cpu()
    ]
    return [replace(one, metadata=outcome.metadata(k)) for k, one in enumerate(done)]


def _full(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """Trains all of the base's own weights."""
    if people != 1:
        raise ValueError(f"full DreamBooth trains one person at a time, got {people}")
    whole = Whole(base, config.text_encoder)
    whole.metadata = learn(whole).metadata(0)
    return [whole]


def _inversion(base: Base, people: int, config: DreamboothConfig, learn: Learn) -> list[TrainedPerson]:
    """Trains the embedding of one word for each person."""
    words = Words(base, people)
    outcome = learn(words)
    return [replace(word, metadata=outcome.metadata(k)) for k, word in enumerate(words.each())]


_METHODS: dict[str, Callable[[Base, int, DreamboothConfig, Learn], list[TrainedPerson]]] = {
    "lidb": _light,
    "lora": _lora,
    "full": _full,
    "textual-inversion": _inversion,
}
