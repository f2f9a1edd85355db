"""A command's job and its settings: a config file, then `--set`, then flags, each over the one before."""

from __future__ import annotations

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
    """Which base a command works on and how it is loaded, in the words of `load_base`."""

    base: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
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


class NoConfig(BaseModel, extra="forbid"):
    """The config of a command that has no settings of its own."""


class RelaxConfig(BaseModel, extra="forbid"):
    """The config of `relax`: the rank of the LoRA, and the seed of the rows that are added."""

    rank: int = Field(4, ge=1)
    seed: int = 0


class GenerateConfig(BaseModel, extra="forbid"):
    """The config of `generate`, in the words of `generate_images`."""

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
        """Prints the settings as YAML."""
        import yaml

        echo(yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True), nl=False)

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
    base = BaseConfig(**{key: given[key] for key in given.keys() & BaseConfig.model_fields})
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
    """Finds the packaged preset of that name, unless there is a file of that name in the current folder."""
    if file is None or file.is_file():
        return file
    packaged = PRESETS / f"{file}.toml"
    return packaged if len(file.parts) == 1 and packaged.is_file() else file
