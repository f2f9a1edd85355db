"""Making people: what each row of the protocol trains or predicts, and what that costs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hyperdreambooth.adapter import Adapter
from hyperdreambooth.base.load import Base
from hyperdreambooth.config import load_config
from hyperdreambooth.evaluate.config import Method
from hyperdreambooth.evaluate.meter import Meter
from hyperdreambooth.faces.dataset import Photo
from hyperdreambooth.files import InputError, load_tensors, save_tensors
from hyperdreambooth.finetune.config import DreamboothConfig, FinetuneConfig
from hyperdreambooth.finetune.dreambooth import TrainedPerson, dreambooth_many
from hyperdreambooth.finetune.fast import finetune_adapters
from hyperdreambooth.finetune.word import Word
from hyperdreambooth.hypernet.predictor import Predictor
from hyperdreambooth.lidb.weights import start
from hyperdreambooth.personalize import Personalizer
from hyperdreambooth.training.config import TrainConfig

Photos = Sequence[Photo]


@dataclass(frozen=True)
class Cost:
    """What a person cost.

    Attributes:
        seconds: from photo to person; where several train side by side, a person's share.
        steps: of training.
        megabytes: peak memory while it was made, of all that trained side by side; None if unknown.
        bytes: what has to be kept of the person, as float32.
        together: people who were trained side by side.
    """

    seconds: float
    steps: int
    megabytes: float | None
    bytes: int
    together: int


@dataclass(frozen=True)
class Makers:
    """What people are made with.

    Attributes:
        base: the frozen base; it is to call people as the hypernetwork was taught to.
        network: the hypernetwork; None where no row needs one.
        second: another one to compare with.
        adapter: what the user brought, for the row `adapter`.
    """

    base: Base
    network: Predictor | None
    second: Predictor | None
    adapter: Adapter | None

    def __post_init__(self) -> None:
        # before any prompt or key is made: prompts are the same for every row
        object.__setattr__(self, "base", _with_words_of(self.base, self.network))

    def with_adapter(self, adapter: Adapter) -> Makers:
        """The same with what the user brought."""
        return replace(self, adapter=adapter)

    def settings(self, method: Method) -> TrainConfig | None:
        """All of a method's settings, defaults included: part of what names its results.

        Raises:
            InputError: an unknown setting or a bad value, or the row's hypernetwork or adapter is missing.
        """
        if method.kind == "prediction":
            self.source(method)
        if method.kind == "file" and self.adapter is None:
            raise InputError("rows: 'adapter' needs --adapter FILE")
        if method.kind == "finetune":
            chosen = load_config(FinetuneConfig, **method.settings)
            return chosen.over(self.predictor(method).info.finetune)
        if method.kind == "scratch":
            return load_config(DreamboothConfig, **method.settings)
        if method.settings:
            raise InputError(f"methods: a {method.kind} has no settings, got {', '.join(method.settings)}")
        return None

    def source(self, method: Method) -> Predictor:
        """The hypernetwork of a row.

        Raises:
            InputError: there is none.
        """
        found = self.second if method.network == "second" else self.network
        if found is None:
            what = "second: expected another" if method.network == "second" else "hypernet: expected a"
            raise InputError(
                f"{what} hypernetwork's folder for a row that predicts, got none; or leave that row out"
            )
        return found

    def predictor(self, method: Method) -> Predictor:
        """The hypernetwork of a row, refining as often as the row says."""
        found = self.source(method)
        if method.refinements is None:
            return found
        once = copy.copy(found)
        once.network = copy.copy(found.network)
        once.network.shape = replace(found.network.shape, refinements=method.refinements)
        return once

    def make(self, method: Method, people: Sequence[Photos]) -> tuple[list[TrainedPerson | None], list[Cost]]:
        """A person for each, made of the photos given, side by side; None for the bare base.

        Args:
            method: how.
            people: the reference photos of each.

        Returns:
            The people, and what each of them cost.
        """
        with Meter(self.base.device) as meter:
            made = _KINDS[method.kind](self, method, people)
        share = round(meter.seconds / len(people), 3)
        memory = None if meter.megabytes is None else round(meter.megabytes)
        return made, [Cost(share, _steps(one), memory, _nbytes(one), len(people)) for one in made]


def _with_words_of(base: Base, network: Predictor | None) -> Base:
    """The base with the trigger and class word that the hypernetwork was trained with."""
    return base if network is None else base.with_words(network.info.trigger, network.info.class_word)


def _steps(person: TrainedPerson | None) -> int:
    return 0 if person is None else int(person.metadata.get("steps", 0))


def _nbytes(person: TrainedPerson | None) -> int:
    """What has to be kept of a person: nothing, LiDB numbers, LoRA factors, a word, or all weights."""
    if isinstance(person, Adapter) and person.lidb is not None:
        return person.lidb.numbers.nbytes
    return sum(tensor.nbytes for tensor in _tensors(person))


def _tensors(person: TrainedPerson | None) -> list[Tensor]:
    """All that the base wears of a person."""
    if person is None:
        return []
    if isinstance(person, Adapter):
        return [factor for pair in person.factors.values() for factor in pair]
    return [person.vector] if isinstance(person, Word) else [*person.weights.values()]


def diverged(person: TrainedPerson | None) -> bool:
    """Whether a training ended in NaN or infinity, or its loss did: then nothing can be said of it.

    A scaler of float16 passes over such steps, and leaves finite what no step has changed.
    """
    if person is not None and person.metadata.get("loss") in ("nan", "inf", "-inf"):
        return True
    return not all(bool(tensor.isfinite().all()) for tensor in _tensors(person))


def _nothing(makers: Makers, method: Method, people: Sequence[Photos]) -> list[TrainedPerson | None]:
    return [None] * len(people)


def _brought(makers: Makers, method: Method, people: Sequence[Photos]) -> list[TrainedPerson | None]:
    return [makers.adapter] * len(people)


def _predicted(makers: Makers, method: Method, people: Sequence[Photos]) -> list[TrainedPerson | None]:
    return [*_predictions(makers, method, people)]


def _predictions(makers: Makers, method: Method, people: Sequence[Photos]) -> list[Adapter]:
    person = Personalizer(makers.base, makers.predictor(method))
    return [person.predict([photo.path for photo in photos]) for photos in people]


def _shared(makers: Makers, method: Method) -> Adapter:
    """The point that every training of LiDB numbers starts from: no change of the base at all."""
    found = makers.predictor(method)
    numbers = start(found.layout, 0)[None].to(found.device)
    made = {k: (down.cpu(), up.cpu()) for k, (down, up) in found.factors(numbers).items()}
    return Adapter(made, makers.base.trigger, makers.base.fingerprint, makers.base.source)


def _finetuned(makers: Makers, method: Method, people: Sequence[Photos]) -> list[TrainedPerson | None]:
    config = makers.settings(method)
    assert isinstance(config, FinetuneConfig)
    if method.start == "shared":
        starts = [_shared(makers, method)] * len(people)
    else:
        starts = _predictions(makers, method, people)
    base = _with_words_of(makers.base, makers.source(method))
    return [*finetune_adapters(base, starts, people, config)]


def _trained(makers: Makers, method: Method, people: Sequence[Photos]) -> list[TrainedPerson | None]:
    config = makers.settings(method)
    assert isinstance(config, DreamboothConfig)
    return [*dreambooth_many(makers.base, people, None, config)]


_KINDS: Mapping[str, Callable[[Makers, Method, Sequence[Photos]], list[TrainedPerson | None]]] = {
    "base": _nothing,
    "file": _brought,
    "prediction": _predicted,
    "finetune": _finetuned,
    "scratch": _trained,
}


def keep(person: TrainedPerson | None, cost: Cost, stem: Path) -> None:
    """Writes what a person cost and, unless it is a whole set of weights, the person.

    Args:
        person: as made.
        cost: what it cost.
        stem: the file without its ending.
    """
    told = {"cost": json.dumps(asdict(cost)), "trigger": getattr(person, "trigger", "")}
    if isinstance(person, Adapter):
        tensors = {f"{site}|{end}": pair[end] for site, pair in person.factors.items() for end in (0, 1)}
    elif isinstance(person, Word):
        tensors = {"word": person.vector}
    else:
        tensors = {"nothing": torch.zeros(1)}
    save_tensors(stem.with_suffix(".safetensors"), tensors, {**told, "kind": type(person).__name__})


def kept(stem: Path, base: Base) -> tuple[TrainedPerson | None, Cost, bool] | None:
    """What `keep` wrote: the person, the cost, and whether the person is there; None for nothing.

    Args:
        stem: the file without its ending.
        base: that the person was made for.
    """
    file = stem.with_suffix(".safetensors")
    if not file.is_file():
        return None
    tensors, told = load_tensors(file)
    cost = Cost(**json.loads(told["cost"]))
    if told["kind"] == "Word":
        return Word(tensors["word"]), cost, True
    if told["kind"] != "Adapter":
        return None, cost, told["kind"] == "NoneType"
    sites = sorted({name.rpartition("|")[0] for name in tensors})
    factors = {site: (tensors[f"{site}|0"], tensors[f"{site}|1"]) for site in sites}
    return Adapter(factors, told["trigger"], base.fingerprint, base.source), cost, True
