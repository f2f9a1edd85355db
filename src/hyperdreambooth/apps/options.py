"""The options that commands share, and how a config is resolved: file, then `--set`, then flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

import typer
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator


def steps_or_auto(words: str) -> str:
    """A number of steps, or `auto`; pydantic would name its own types."""
    if words != "auto" and not words.isdecimal():
        raise typer.BadParameter(f"expected a whole number or auto, got {words!r}")
    return words


def named_path(words: str) -> Path:
    """A path; an empty word, which a shell makes of an unset variable, is not the current folder."""
    if not words:
        raise typer.BadParameter("expected a file or a folder, got ''")
    return Path(words)


def must_exist(*paths: Path) -> None:
    """Refuses files that are not there, before the imports and models that take seconds.

    Raises:
        typer.BadParameter: naming the first of them.
    """
    for path in paths:
        if not path.exists():
            raise typer.BadParameter(f"{path}: no such file")


ConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--config", help="TOML, YAML or JSON file, or the name of a preset.", show_default=False),
]
Sets: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="key=value, over the file; repeat it.", metavar="KEY=VALUE", show_default=False
    ),
]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
BaseName: TypeAlias = Annotated[
    str | None,
    typer.Option("--base", help="Pipeline folder or hub id [the embedded avatars].", show_default=False),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, mps.", show_default=False)
]
HypernetName: TypeAlias = Annotated[
    str | None,
    typer.Option("--hypernet", help="Folder or hub id [the embedded avatars'].", show_default=False),
]
Seed: TypeAlias = Annotated[
    int | None, typer.Option("--seed", help="Of everything drawn.", show_default=False)
]
Rank: TypeAlias = Annotated[int | None, typer.Option("--rank", help="Rank of the LoRA.", show_default=False)]
Steps: TypeAlias = Annotated[int | None, typer.Option("--steps", help="Training steps.", show_default=False)]
StepsOrAuto: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--steps",
        help="Training steps, or auto: until the loss stops falling.",
        show_default=False,
        parser=steps_or_auto,
        metavar="INTEGER|auto",
    ),
]
Photos: TypeAlias = Annotated[
    list[Path],
    typer.Argument(help="Photos of one person: files or folders.", parser=named_path),
]
Weights: TypeAlias = Annotated[
    list[float] | None, typer.Option("--weight", help="Of each adapter, in order.", show_default=False)
]
Form = Literal["diffusers", "kohya", "lidb"]

PRESETS = Path(__file__).parent.parent / "presets"
TABLES = (
    "prepare", "dreambooth", "preoptimize", "train", "finetune", "relax", "personalize", "demo", "generate",
    "evaluate",
)  # fmt: skip
"""Commands that a config file may have a table for, so that one file holds a whole recipe."""


class Place(BaseModel):
    """Which base a command works on, where and how: keys that every config accepts (see `load_base`)."""

    model_config = ConfigDict(extra="forbid")

    base: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    variant: str | None = None
    offline: bool = False
    base_config: str | None = None
    leave_out: tuple[str, ...] = ()
    trigger: str | None = None
    class_word: str | None = None
    resolution: int | None = Field(None, ge=8)
    add_sites: str | None = None
    skip_sites: str | None = None
    offload: bool = False

    def loading(self) -> dict[str, Any]:
        """What `load_base` takes."""
        return {"source": self.base, **self.model_dump(exclude={"base"})}


class Nothing(BaseModel):
    """The config of a command that has no settings of its own."""

    model_config = ConfigDict(extra="forbid")


class Relaxation(BaseModel):
    """The config of `relax`."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(4, ge=1)
    seed: int = 0


class Sampling(BaseModel):
    """How pictures are drawn: the config of `generate`.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance; 1 for none.
        images: pictures a prompt.
        negative: what they should not show.
        size: pixels; None for the base's own.
        batch: pictures drawn together.
    """

    model_config = ConfigDict(extra="forbid")

    seed: int = 0
    steps: int = Field(25, ge=1)
    guidance: float = Field(4.0, ge=0)
    images: int = Field(1, ge=1)
    negative: str | None = None
    size: int | None = Field(None, ge=8)
    batch: int = Field(8, ge=1)


Method = TypeVar("Method", bound=BaseModel)


class Resolved(Generic[Method]):
    """A resolved config: `place` for the base, `own` for the command's method."""

    def __init__(self, place: Place, own: Method) -> None:
        self.place, self.own = place, own

    def plain(self) -> dict[str, Any]:
        """One flat table, as `--dry-run` prints it and `--config` reads it."""
        return {**self.place.model_dump(mode="json"), **self.own.model_dump(mode="json")}

    def show(self) -> None:
        """Prints the config as YAML."""
        show(self.plain())


def show(config: Mapping[str, Any]) -> None:
    """Prints a config as YAML, which `--config` reads."""
    import yaml

    typer.echo(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), nl=False)


def resolve(
    command: str, model: type[Method], file: Path | None, sets: Sequence[str] | None, **flags: Any
) -> Resolved[Method]:
    """Merges and checks a command's config.

    Args:
        command: its name; a table of that name in the file counts as if it stood at the top, other commands'
            tables are passed over unless the model has such a field.
        model: the method's config.
        file: a config file or the name of a preset.
        sets: `key=value` words.
        flags: the command's own flags; None where not given.

    Raises:
        InputError: one line naming the key.
    """
    from hyperdreambooth.config import load_config

    own_table: Any = model_validator(mode="before")(partial(_flatten, command, model))
    both = create_model(f"{command}Config", __base__=(model, Place), __validators__={"own_table": own_table})
    merged = load_config(both, _preset(file), tuple(sets or ()), **flags).model_dump(exclude_unset=True)
    place = {key: value for key, value in merged.items() if key in Place.model_fields}
    own = {key: value for key, value in merged.items() if key in model.model_fields}
    return Resolved(Place(**place), model(**own))


def resolve_alone(model: type[Method], file: Path | None, sets: Sequence[str] | None, **flags: Any) -> Method:
    """The config of a command that works on no base."""
    from hyperdreambooth.config import load_config

    return load_config(model, _preset(file), tuple(sets or ()), **flags)


def _flatten(command: str, model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """The command's own table under the keys at the top; other commands' tables are dropped."""
    others = set(TABLES) - set(model.model_fields)
    tables = {name: value for name, value in data.items() if name in others and isinstance(value, dict)}
    top = {name: value for name, value in data.items() if name not in tables}
    return _over(tables.get(command, {}), top)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables as one, the second's values over the first's, in nested tables too."""
    both = {
        name: _over(below[name], above[name])
        for name in below.keys() & above.keys()
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping)
    }
    return {**below, **above, **both}


def _preset(file: Path | None) -> Path | None:
    """`--config paper` names the packaged preset, unless such a file is there (a folder may: a run's own)."""
    if file is None or file.is_file():
        return file
    packaged = PRESETS / f"{file}.toml"
    return packaged if len(file.parts) == 1 and packaged.is_file() else file
