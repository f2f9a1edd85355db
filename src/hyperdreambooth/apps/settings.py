"""A command's job and its settings: a config file, then `--set`, then flags, each over the one before."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator
from typer import echo

Own = TypeVar("Own", bound=BaseModel)

PRESETS = Path(__file__).parent.parent / "presets"
TABLES = (
    "prepare", "dreambooth", "preoptimize", "train", "finetune", "relax", "personalize", "demo", "generate",
    "evaluate",
)  # fmt: skip
"""Commands that may have a table in a config file, so that one file holds a whole recipe."""


class BaseConfig(BaseModel, extra="forbid"):
    """Which base a command works on and how it is loaded, in the words of `load_base`.

    Attributes:
        base: a pipeline folder, a hub id or a single .safetensors file; null for the embedded avatars.
        device: auto, cpu, cuda or mps.
        dtype: the number format of the frozen weights; auto is bfloat16 on GPUs that are faster in it, and
            float32 elsewhere.
        variant: of the files to load, such as fp16; null for the only one that a folder has.
        offline: look at files on this machine only.
        base_config: a pipeline like a single file's; null to see it from the weights.
        leave_out: components that the pipeline can do without, such as text_encoder_3.
        trigger: the rare word that means the person; null for the base's own.
        class_word: what a person is called, such as face; null for the base's own.
        resolution: the pixels a side to work at; null for the base's own.
        add_sites: a pattern of linear layers to adapt besides those of the attention.
        skip_sites: a pattern of sites to leave out.
        offload: keep networks without an adapter on the CPU while training.
        quantize: int8 or nf4 for the weights of the denoiser and of frozen text encoders; null for neither.
    """

    base: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    variant: str | None = None
    offline: bool = False
    base_config: str | None = None
    leave_out: tuple[str, ...] = ()
    trigger: str | None = None
    class_word: str | None = None
    resolution: int | None = Field(default=None, ge=8)
    add_sites: str | None = None
    skip_sites: str | None = None
    offload: bool = False
    quantize: Literal["int8", "nf4"] | None = None


class NoConfig(BaseModel, extra="forbid"):
    """The config of a command that has no settings of its own."""


class RelaxConfig(BaseModel, extra="forbid"):
    """The config of `relax`.

    Attributes:
        rank: the rank of the LoRA.
        seed: the seed of the rows that are added.
    """

    rank: int = Field(4, ge=1)
    seed: int = 0


class GenerateConfig(BaseModel, extra="forbid"):
    """The config of `generate`, in the words of `generate_images`.

    Attributes:
        seed: the seed of all pictures.
        steps: the denoising steps.
        guidance: the scale of classifier-free guidance; 1 or less for none.
        images: the pictures of each prompt.
        negative: what the pictures should not show; null for nothing.
        size: the side in pixels; null for the base's own.
        batch: the pictures that are drawn together.
    """

    seed: int = 0
    steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)
    images: int = Field(1, ge=1)
    negative: str | None = None
    size: int | None = Field(None, ge=8)
    batch: int = Field(8, ge=1)


class RenderConfig(BaseModel, extra="forbid"):
    """The config of `avatars render`: the first people of a split, and the seed of the photos' contexts."""

    split: str = "train"
    identities: int = Field(100, ge=1)
    photos: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Job(Generic[Own]):
    """A run of a command: its settings, and the seconds that its stages take.

    Attributes:
        own: the command's own config.
        on_base: whether the command loads a base at all.
        began: when the command began, by `time.perf_counter`.
    """

    command: str
    own: Own
    base: BaseConfig = field(default_factory=BaseConfig)
    on_base: bool = True
    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def flat(self) -> dict[str, Any]:
        """Returns one flat table, as `--dry-run` prints it and `--config` reads it."""
        base = self.base.model_dump(mode="json") if self.on_base else {}
        return {**base, **self.own.model_dump(mode="json")}

    def show(self) -> None:
        """Prints the settings as YAML, each below a comment that says what it means."""
        import yaml

        known = meanings(type(self.base)) | meanings(type(self.own))
        for key, value in self.flat().items():
            if key in known:
                echo(f"# {known[key]}")
            echo(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True), nl=False)

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Adds the seconds that the block takes to the stage `name`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)

    def report(self, target: Path, **entries: Any) -> None:
        """Writes what ran, and how long: `target/report.json` for a folder, else `target.report.json`."""
        from hyperdreambooth.files import write_json
        from hyperdreambooth.runs import environment

        file = target / "report.json" if target.is_dir() else target.with_name(f"{target.name}.report.json")
        config = self.flat()
        seconds = {**self.seconds, "total": round(time.perf_counter() - self.began, 3)}
        stamp = {"command": self.command, "config": config, "seed": config.get("seed")}
        write_json(file, {**stamp, **entries, "seconds": seconds, "environment": environment()})


def settings_of(job: Job[Any]) -> Mapping[str, Any]:
    """Returns what all shards of a job have in common."""
    return {"command": job.command, **job.flat()}


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Returns what the docstrings of a config and of its parents say of each field, on one line."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \w)", "\n" + text):
            names, colon, meaning = entry.partition(": ")
            if colon:
                found |= dict.fromkeys(re.findall(r"\w+", names), " ".join(meaning.split()))
    return {name: found[name] for name in model.model_fields if name in found}


def resolve(
    command: str,
    model: type[Own],
    file: Path | None = None,
    sets: Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    on_base: bool = True,
) -> Job[Own]:
    """Merges and checks the settings of a command.

    A table of the command's name in the file counts as if its keys stood at the top. The tables of other
    commands are ignored unless the model has a field of that name.

    Args:
        command: the command's name.
        model: the command's own config.
        file: a config file or the name of a preset.
        sets: `key=value` assignments.
        flags: the values of flags, by key; None where a flag was not given.
        on_base: whether the command loads a base and so accepts the keys of `BaseConfig`.
    """
    from hyperdreambooth.config import load_config

    flatten: Any = model_validator(mode="before")(partial(_flatten, command, model, on_base))
    parts = (model, BaseConfig) if on_base else model
    both = create_model(f"{command}Config", __base__=parts, __validators__={"flatten": flatten})
    merged = load_config(both, _preset(file), tuple(sets or ()), **(flags or {}))
    given = merged.model_dump(exclude_unset=True)
    own = model(**{key: given[key] for key in given.keys() & model.model_fields})
    # a command that loads no base may have fields of the same names, as the stage `base` of a build
    loaded = given.keys() & BaseConfig.model_fields if on_base else ()
    base = BaseConfig(**{key: given[key] for key in loaded})
    return Job(command, own, base, on_base)


def _flatten(command: str, model: type[BaseModel], on_base: bool, data: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the command's own table with the keys at the top and drops what is meant for other commands."""
    others = set(TABLES) - set(model.model_fields)
    tables = {key: value for key, value in data.items() if key in others and isinstance(value, dict)}
    top = {key: value for key, value in data.items() if key not in tables}
    if command in TABLES and not on_base:  # the base of a recipe is for its other commands
        top = {key: value for key, value in top.items() if key not in BaseConfig.model_fields}
    return _over(tables.get(command, {}), top)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two tables and their nested tables; the second one's values win."""
    both = {
        key: _over(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping)
    }
    return {**below, **above, **both}


def _preset(file: Path | None) -> Path | None:
    """Finds the packaged preset of a name without a suffix, unless a file here has that name."""
    if file is None or file.is_file():
        return file
    if len(file.parts) > 1 or file.suffix:
        return file
    presets = sorted(preset.stem for preset in PRESETS.glob("*.toml"))
    if file.name not in presets:
        from hyperdreambooth.files import InputError

        raise InputError(f"{file}: no such config file, and no preset; the presets are {', '.join(presets)}")
    return PRESETS / f"{file}.toml"
