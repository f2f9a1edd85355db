"""What several commands do with the method: load, open an adapter by name, save it in every form."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import diffusers
import huggingface_hub.utils
import torch
import transformers
import typer
from PIL import Image

from hyperdreambooth.adapter import Adapter, load_adapter
from hyperdreambooth.apps.options import Form, Place, Resolved, resolve
from hyperdreambooth.base.load import Base, is_embedded, load_base
from hyperdreambooth.evaluate.base_scorers import BaseScorers, load_base_scorers
from hyperdreambooth.faces.dataset import Photo, read_person
from hyperdreambooth.faces.image import open_photo
from hyperdreambooth.files import InputError, check_writable
from hyperdreambooth.finetune.config import FinetuneConfig
from hyperdreambooth.finetune.dreambooth import TrainedPerson
from hyperdreambooth.finetune.word import Word
from hyperdreambooth.generate import generate
from hyperdreambooth.hypernet.predictor import Predictor, load_hypernet, load_info
from hyperdreambooth.hypernet.validate import PersonSampler, Score
from hyperdreambooth.lidb.basis import Basis
from hyperdreambooth.lora.formats.merged import save_merged
from hyperdreambooth.lora.formats.write import check_name
from hyperdreambooth.lora.inject import wearable
from hyperdreambooth.personalize import EMBEDDED_HYPERNET, FILES, Personalizer
from hyperdreambooth.shapes import Factors

WORD = "learned_embeds.safetensors"
"""What diffusers calls the file of a textual inversion."""

Tuned = TypeVar("Tuned", bound=FinetuneConfig)


def resolve_tuned(
    command: str, model: type[Tuned], hypernet: str | None, file: Path | None, sets: Sequence[str] | None,
    **flags: Any,
) -> Resolved[Tuned]:  # fmt: skip
    """`resolve`, where what nobody sets is as the hypernetwork's folder recommends.

    Raises:
        InputError: one line naming the key, or no such hypernetwork.
    """
    settings = resolve(command, model, file, sets, **flags)
    if hypernet is None and not is_embedded(settings.place.base):
        return settings  # an adapter from elsewhere: nobody recommends anything
    return Resolved(settings.place, settings.own.over(load_info(hypernet or EMBEDDED_HYPERNET).finetune))


def load(place: Place) -> Base:
    """The base that a command's config names."""
    _only_our_bars()
    return load_base(**place.loading())


def load_personalizer(place: Place, hypernet: str | None) -> Personalizer:
    """The base with its hypernetwork; None for the embedded ones."""
    _only_our_bars()
    options = place.loading()
    return Personalizer.from_pretrained(options.pop("source"), hypernet, **options)


def _only_our_bars() -> None:
    """Loading local files needs no bar, and an error should stand alone; downloads keep theirs."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


def person(photos: Sequence[Path]) -> tuple[Photo, ...]:
    """The photos of one person."""
    return read_person(list(photos))


def class_sampler(base: Base) -> Callable[[Sequence[str], Sequence[int]], list[Image.Image]]:
    """Draws class images for prior preservation: prompts and a seed for each → pictures."""
    return lambda prompts, seeds: generate(base, prompts, seed=list(seeds))


def load_predictor(hypernet: str | None, base: Base) -> Predictor:
    """The hypernetwork by folder or hub id; by default the one that belongs to the embedded avatars."""
    return load_hypernet(hypernet or EMBEDDED_HYPERNET, base.device)


def open_adapter(file: Path, base: Base, hypernet: str | None = None) -> Adapter:
    """Any adapter file, checked against the base; learned bases come from the hypernetwork that predicted it.

    Raises:
        InputError: damaged, or of another base or basis.
    """

    def basis_of(source: str) -> Basis:
        found = load_predictor(hypernet, base).basis
        if found.source != source:
            raise InputError(f"{file}: made over basis {source}, not {found.source}; pass its own --hypernet")
        return found

    return load_adapter(file, base.sites, base.fingerprint, basis_of, wearable(base.components))


def open_weighted(
    files: Sequence[Path], weights: Sequence[float], base: Base, hypernet: str | None = None
) -> list[tuple[Adapter, float]]:
    """Adapter files with their weights, 1 where none is given.

    Raises:
        InputError: another number of weights than of files, a weight that is no number, or a file that does
            not fit.
    """
    if strange := [weight for weight in weights if not math.isfinite(weight)]:
        raise InputError(f"--weight: expected finite numbers, got {strange[0]}")
    if len(weights) not in (0, len(files)):
        raise InputError(
            f"--weight: expected one for each of the {len(files)} adapters or none, got {len(weights)}"
        )
    given = weights or [1.0] * len(files)
    return [(open_adapter(file, base, hypernet), weight) for file, weight in zip(files, given, strict=True)]


def check_file(out: Path) -> None:
    """Refuses an output that cannot become a safetensors file, before the work."""
    check_name(out)
    if out.is_dir():
        raise InputError(f"out {out}: expected a file to write, found a folder; pass another --out")
    check_writable(out.parent)


def save_forms(
    adapter: Adapter, out: Path, resolution: int, form: Form | Literal["all"] = "all", dtype: str = "float32"
) -> dict[str, str]:
    """Writes one form of an adapter, or every form it has, into a folder: all or none; form → file name."""
    having: list[Form] = [one for one in FILES if one != "lidb" or adapter.lidb is not None]
    files: dict[Form, str] = {one: FILES[one] for one in (having if form == "all" else (form,))}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".forms-", dir=out) as part:
        for one, name in files.items():
            adapter.save(Path(part) / name, one, resolution, getattr(torch, dtype))
        for name in files.values():
            os.replace(Path(part) / name, out / name)
    return {str(one): name for one, name in files.items()}


def save_trained(person: TrainedPerson, out: Path, base: Base) -> dict[str, str]:
    """Writes what DreamBooth made of a person: an adapter's forms, a whole pipeline, or a word."""
    if isinstance(person, Adapter):
        return save_forms(person, out, base.resolution)
    if isinstance(person, Word):
        person.save(out / WORD)
        return {"textual-inversion": WORD}
    person.save(out / "pipeline", base)
    return {"pipeline": "pipeline"}


def steps_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """For a report: the steps a training took and, where it stopped by itself, why; that is printed too."""
    found: dict[str, Any] = {"steps": int(metadata.get("steps", 0))}
    if "stopped" in metadata:
        found["stopped"] = metadata["stopped"]
        typer.echo(f"{'steps':12} {found['steps']}: {found['stopped']}")
    return found


def save_pipeline(adapter: Adapter, out: Path, base: Base, dtype: str = "float32") -> dict[str, str]:
    """Writes the base with the adapter folded in, a folder that is a base of its own."""
    for part in base.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, getattr(torch, dtype))  # diffusers' own warns of nothing
    about = {"trigger": adapter.trigger or base.trigger, "class_word": base.class_word}
    save_merged(out / "merged", base.pipe, base.components, adapter.factors, about)
    return {"merged": "merged"}


def tell(out: Path, files: Mapping[str, str]) -> None:
    """Says where everything is."""
    for name, file in files.items():
        typer.echo(f"{name:12} {out / file}")


def is_main_process() -> bool:
    """False in the second and later processes of `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def validation(base: Base) -> tuple[PersonSampler, Score | None]:
    """How a hypernetwork in training shows itself: pictures of held-out people, and their mean scores."""

    def sample(prompts: Sequence[str], factors: Factors) -> list[Image.Image]:
        return generate(base, prompts, per_prompt=factors)

    scorers = load_base_scorers(base)
    return sample, partial(_mean_scores, scorers) if scorers is not None else None


def _mean_scores(
    scorers: BaseScorers,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    others: Sequence[Sequence[Path]],
) -> dict[str, float]:
    """Mean `identity`, of people who have another photo, and mean `prompt`; left out where there is none."""
    known = [(image, paths) for image, paths in zip(images, others, strict=True) if paths]
    likeness = [scorers.identity([image], [open_photo(path) for path in paths])[0] for image, paths in known]
    identity = sum(likeness) / len(likeness) if likeness else None
    figures = {"identity": identity, "prompt": scorers.summary(images, prompts)["prompt"]}
    return {name: value for name, value in figures.items() if value is not None}
