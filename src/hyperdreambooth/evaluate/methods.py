"""The methods: how each row of the protocol makes its people, and what that costs."""

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
from hyperdreambooth.evaluate.meter import measured
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
    """The cost of one person.

    Attributes:
        seconds: from photo to person; a person's share of them where several are trained together.
        steps: training steps.
        megabytes: peak memory in MiB while the person was made, with all who were trained together; None if
            unknown.
        bytes: the size of what has to be kept of the person, as float32.
        together: how many people were trained together.
    """

    seconds: float
    steps: int
    megabytes: float | None
    bytes: int
    together: int


@dataclass(frozen=True)
class Makers:
    """The models that make people.

    Attributes:
        base: the frozen base.
        network: the hypernetwork; None if no row needs one.
        second: another hypernetwork to compare with.
        adapter: the user's adapter, for the row `adapter`.
    """

    base: Base
    network: Predictor | None
    second: Predictor | None
    adapter: Adapter | None

    def base_for(self, method: Method | None = None) -> Base:
        """Returns the base with the words of a row's hypernetwork: its captions and prompts use them.

        Args:
            method: of the row. Rows of the second hypernetwork use its words; all others, None included, use
                those of `network` if there is one.
        """
        network = self.second if method is not None and method.network == "second" else self.network
        if network is None:
            return self.base
        return self.base.with_words(network.info.trigger, network.info.class_word)

    def settings(self, method: Method) -> TrainConfig | None:
        """Returns all settings of a method, with their defaults; None for a method that trains nothing.

        Raises:
            InputError: an unknown setting or a bad value, or the row's hypernetwork or adapter is missing.
        """
        if method.kind == "prediction":
            self.source(method)
        if method.kind == "file" and self.adapter is None:
            raise InputError("rows: 'adapter' needs --adapter FILE")
        if method.kind == "finetune":
            return load_config(FinetuneConfig, **method.settings).over(self.source(method).info.finetune)
        if method.kind == "scratch":
            return load_config(DreamboothConfig, **method.settings)
        if method.settings:
            raise InputError(
                f"methods: a row of kind {method.kind} has no settings, got {', '.join(method.settings)}"
            )
        return None

    def source(self, method: Method) -> Predictor:
        """Returns the hypernetwork of a row.

        Raises:
            InputError: there is none.
        """
        found = self.second if method.network == "second" else self.network
        if found is None:
            expected = "second: expected another" if method.network == "second" else "hypernet: expected a"
            raise InputError(
                f"{expected} hypernetwork's folder for a row that predicts, got none; or leave that row out"
            )
        return found

    def predictor(self, method: Method) -> Predictor:
        """Returns the hypernetwork of a row, with the row's number of refinements."""
        found = self.source(method)
        if method.refinements is None:
            return found
        changed = copy.copy(found)
        changed.network = copy.copy(found.network)
        changed.network.shape = replace(found.network.shape, refinements=method.refinements)
        return changed

    def make(self, method: Method, people: Sequence[Photos]) -> tuple[list[TrainedPerson | None], list[Cost]]:
        """Makes several people together, each from photos.

        Args:
            method: how.
            people: the reference photos of each.

        Returns:
            The people, None for the bare base, and the cost of each.
        """
        with measured(self.base.device) as found:
            made = _KINDS[method.kind](self, method, people)
        share = round(found.seconds / len(people), 3)
        memory = None if found.megabytes is None else round(found.megabytes)
        return [*made], [Cost(share, _steps(one), memory, _nbytes(one), len(people)) for one in made]


def _steps(person: TrainedPerson | None) -> int:
    return 0 if person is None else int(person.metadata.get("steps", 0))


def _nbytes(person: TrainedPerson | None) -> int:
    """Returns the bytes to keep of a person: of LiDB numbers, LoRA factors, a word or all weights."""
    if isinstance(person, Adapter) and person.lidb is not None:
        return person.lidb.numbers.nbytes
    return sum(tensor.nbytes for tensor in _tensors(person))


def _tensors(person: TrainedPerson | None) -> list[Tensor]:
    """Returns all tensors of a person that the base wears."""
    if person is None:
        return []
    if isinstance(person, Adapter):
        return [factor for pair in person.factors.values() for factor in pair]
    return [person.vector] if isinstance(person, Word) else [*person.weights.values()]


def diverged(person: TrainedPerson | None) -> bool:
    """Returns whether a training, or its last loss, ended in NaN or infinity.

    The loss counts as well because float16's scaler skips steps without finite gradients: the numbers then
    stay finite, but are untrained.
    """
    if person is not None and person.metadata.get("loss") in ("nan", "inf", "-inf"):
        return True
    return not all(bool(tensor.isfinite().all()) for tensor in _tensors(person))


def _predicted(makers: Makers, method: Method, people: Sequence[Photos]) -> list[Adapter]:
    person = Personalizer(makers.base, makers.predictor(method))
    return [person.predict([photo.path for photo in photos]) for photos in people]


def _shared(makers: Makers, method: Method) -> Adapter:
    """Returns the start of every training of LiDB numbers, where ΔW = 0."""
    found, base = makers.predictor(method), makers.base_for(method)
    numbers = start(found.layout, 0)[None].to(found.device)
    made = {k: (down.cpu(), up.cpu()) for k, (down, up) in found.factors(numbers).items()}
    return Adapter(made, base.trigger, base.fingerprint, base.source, base.resolution)


def _finetuned(makers: Makers, method: Method, people: Sequence[Photos]) -> Sequence[TrainedPerson]:
    config, base = makers.settings(method), makers.base_for(method)
    assert isinstance(config, FinetuneConfig)
    if method.start == "shared":
        starts = [_shared(makers, method)] * len(people)
    else:
        starts = _predicted(makers, method, people)
    return finetune_adapters(base, starts, people, config)


def _from_scratch(makers: Makers, method: Method, people: Sequence[Photos]) -> Sequence[TrainedPerson]:
    config, base = makers.settings(method), makers.base_for(method)
    assert isinstance(config, DreamboothConfig)
    return dreambooth_many(base, people, None, config)


_KINDS: Mapping[str, Callable[[Makers, Method, Sequence[Photos]], Sequence[TrainedPerson | None]]] = {
    "base": lambda makers, method, people: [None] * len(people),
    "file": lambda makers, method, people: [makers.adapter] * len(people),
    "prediction": _predicted,
    "finetune": _finetuned,
    "scratch": _from_scratch,
}


def keep(person: TrainedPerson | None, cost: Cost, stem: Path) -> None:
    """Writes the cost of a person and, unless it is a whole set of weights, the person.

    Args:
        person: as made.
        cost: of that person.
        stem: the file without its ending.
    """
    if isinstance(person, Adapter):
        tensors = {f"{site}|{end}": pair[end] for site, pair in person.factors.items() for end in (0, 1)}
    elif isinstance(person, Word):
        tensors = {"word": person.vector}
    else:
        tensors = {"nothing": torch.zeros(1)}
    metadata = {"cost": json.dumps(asdict(cost)), "trigger": getattr(person, "trigger", "")}
    save_tensors(stem.with_suffix(".safetensors"), tensors, {**metadata, "kind": type(person).__name__})


def kept(stem: Path, base: Base) -> tuple[TrainedPerson | None, Cost, bool] | None:
    """Reads what `keep` wrote.

    Args:
        stem: the file without its ending.
        base: the base that the person was made for.

    Returns:
        The person, the cost, and whether the person was kept; None if there is no file.
    """
    file = stem.with_suffix(".safetensors")
    if not file.is_file():
        return None
    tensors, metadata = load_tensors(file)
    cost, kind = Cost(**json.loads(metadata["cost"])), metadata["kind"]
    if kind == "Word":
        return Word(tensors["word"]), cost, True
    if kind != "Adapter":
        return None, cost, kind == "NoneType"
    sites = sorted({name.rpartition("|")[0] for name in tensors})
    factors = {site: (tensors[f"{site}|0"], tensors[f"{site}|1"]) for site in sites}
    return Adapter(factors, metadata["trigger"], base.fingerprint, base.source), cost, True
