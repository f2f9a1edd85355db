"""Reads and checks a config: a file, `key.sub=value` assignments over it, single fields over both."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hyperdreambooth.files import InputError, read_text

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str, ...]


def load_config(
    model: type[Model], file: Path | None = None, sets: Sequence[str] = (), /, **fields: Any
) -> Model:
    """Reads, merges and checks a config.

    Args:
        model: the class of the config; unknown keys are errors if it has `extra="forbid"`.
        file: a TOML, YAML or JSON file.
        sets: assignments such as `a.b=1`, which override the file. The value is a TOML or JSON literal, or
            else a text.
        fields: values that override `sets`; None overrides nothing.

    Raises:
        InputError: the file cannot be read, a key is unknown or a value wrong. The message is one line that
            names every wrong key.
    """
    data = _read(file) if file else {}
    assigned = [_assignment(item) for item in sets]
    for key, text in assigned:
        _put(data, key, literal(text))
    texts = dict(assigned)
    data.update({name: value for name, value in fields.items() if value is not None})
    data = _over_defaults(model, data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        wrong = error
    # what reads as a literal may be meant as a text (`--set title=2024`)
    for each in wrong.errors():
        key = tuple(map(str, each["loc"]))
        if each["type"] in ("string_type", "path_type") and key in texts:
            _put(data, key, texts[key])
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(model, data, error, file, texts)) from None


def _read(file: Path) -> dict[str, Any]:
    """Reads a file as nested dicts."""
    readers = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
    if file.suffix.lower() not in readers:
        raise InputError(f"{file}: expected a config file that ends in {', '.join(readers)}")
    text = read_text(file)
    try:
        data = readers[file.suffix.lower()](text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot read the config: {error}") from None
    if not isinstance(data, dict | None):  # None is an empty YAML file
        raise InputError(f"{file}: expected keys and values, got {type(data).__name__}")
    return data or {}


def _assignment(item: str) -> tuple[Key, str]:
    """Splits `a.b=1` into its key and its value."""
    name, equals, value = item.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        raise InputError(f"--set {item}: expected key=value, for example --set steps=100")
    return key, value.strip()


def literal(text: str) -> Any:
    """Parses a TOML or JSON literal; any other text stays as it is."""
    try:
        table = tomllib.loads(f"value = {text}")
        if table.keys() == {"value"}:  # a line break in the text could start another key
            return table["value"]
    except ValueError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(data: dict[str, Any], key: Key, value: Any) -> None:
    """Sets a nested key and makes the tables above it."""
    table: Any = data
    for depth, name in enumerate(key[:-1], start=1):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            above = ".".join(key[:depth])
            raise InputError(f"--set {'.'.join(key)}: '{above}' is a value, not a table of keys")
    table[key[-1]] = value


def _over_defaults(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data with what a table leaves out as the default of its own field has it.

    Pydantic would take the defaults of the table's class, which may be others.
    """
    full = dict(data)
    for name, field in model.model_fields.items():
        default, given = field.default, data.get(name)
        if isinstance(default, BaseModel) and isinstance(given, Mapping):
            table = _over_defaults(type(default), given)  # pyright: ignore[reportUnknownArgumentType]
            full[name] = {**default.model_dump(), **table}
    return full


def _explain(
    model: type[BaseModel], data: Any, error: ValidationError, file: Path | None, texts: Mapping[Key, str]
) -> str:
    """Describes every mistake in one line."""
    lines: list[str] = []
    wrong: dict[str, tuple[list[str], str]] = {}
    for each in error.errors():
        loc = tuple(map(str, each["loc"]))
        place = loc if each["type"] in ("extra_forbidden", "missing") else _place(data, loc)
        source = "--set " if place in texts else f"{file}: " if file else ""
        name = f"{source}{'.'.join(place) or 'config'}"
        if each["type"] == "extra_forbidden":
            allowed = _allowed(model, loc[:-1])
            near = difflib.get_close_matches(loc[-1], allowed, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            lines.append(f"{source}unknown key '{'.'.join(loc)}' ({hint}allowed: {', '.join(allowed)})")
        elif each["type"] == "missing":
            lines.append(f"{name}: {each['msg']}")
        else:
            wrong.setdefault(name, ([], str(each["input"])[:80]))[0].append(each["msg"])
    lines += [f"{name}: {_any_of(messages)}, got {got!r}" for name, (messages, got) in wrong.items()]
    return "; ".join(lines)


def _place(data: Any, loc: Key) -> Key:
    """Cuts a location to what the data has: pydantic appends which alternative of a union it tried."""
    for depth, name in enumerate(loc):
        try:
            data = data[int(name) if isinstance(data, list | tuple) else name]
        except (LookupError, TypeError, ValueError):
            return loc[:depth]
    return loc


def _any_of(messages: Sequence[str]) -> str:
    """Joins the messages of a union's alternatives into one sentence."""
    start = "Input should be "
    if len(messages) == 1 or not all(message.startswith(start) for message in messages):
        return " or ".join(messages)
    return start + " or ".join(message.removeprefix(start).partition(",")[0] for message in messages)


def _allowed(model: type[BaseModel], loc: Key) -> list[str]:
    """Returns the keys that the table at `loc` may have."""
    for name in loc:
        field = model.model_fields.get(name)
        for kind in [field.annotation, *get_args(field.annotation)] if field else []:
            model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else model
    return sorted(model.model_fields)
