"""Resolved settings: a TOML or YAML file, `--set key.sub=value` over it, a command's own flags over both."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hyperdreambooth.files import InputError

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str, ...]


def load_config(
    model: type[Model], file: Path | None = None, sets: Sequence[str] = (), /, **fields: Any
) -> Model:
    """Read, merge and check a config.

    Args:
        model: what the config must be; unknown keys are errors (``extra="forbid"``).
        file: TOML, YAML or JSON.
        sets: ``"a.b=1"``; the value is a TOML or JSON literal, else words. They beat the file.
        fields: a command's own flags; those that are not None beat ``sets``.

    Raises:
        InputError: an unreadable file, an unknown key, a bad value; one line that names the key.
    """
    data = _read(file) if file else {}
    words: dict[Key, str] = {}
    for item in sets:
        key, value = _assignment(item)
        words[key] = value
        _put(data, key, literal(value))
    data.update({name: value for name, value in fields.items() if value is not None})
    try:
        return model.model_validate(data)
    except ValidationError as error:
        if not _reword(data, error, words):
            raise InputError(_explain(model, data, error, file, words)) from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(model, data, error, file, words)) from None


def _read(file: Path) -> dict[str, Any]:
    """The file as nested dicts."""
    readers = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
    if file.suffix.lower() not in readers:
        raise InputError(f"{file}: expected a config that ends in {', '.join(readers)}")
    try:
        data = readers[file.suffix.lower()](file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such config file") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot read the config: {error}") from None
    if data is None:  # an empty YAML file
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected keys and values, got {type(data).__name__}")
    return data


def _assignment(item: str) -> tuple[Key, str]:
    """``"a.b=1"`` as its key and its words."""
    name, equals, value = item.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        raise InputError(f"--set {item}: expected key=value, for example --set steps=100")
    return key, value.strip()


def literal(words: str) -> Any:
    """A TOML or JSON literal, else the words themselves."""
    try:
        table = tomllib.loads(f"value = {words}")
        if table.keys() == {"value"}:  # a line break in the words could start another key
            return table["value"]
    except ValueError:
        pass
    try:
        return json.loads(words)
    except ValueError:
        return words


def _put(data: dict[str, Any], key: Key, value: Any) -> None:
    """Set a nested key, making the tables on the way."""
    table: Any = data
    for depth, name in enumerate(key, start=1):
        if not isinstance(table, dict):
            above = ".".join(key[: depth - 1])
            raise InputError(f"--set {'.'.join(key)}: '{above}' is a value, not a table of keys")
        if depth == len(key):
            table[name] = value
        else:
            table = table.setdefault(name, {})


def _reword(data: dict[str, Any], error: ValidationError, words: Mapping[Key, str]) -> bool:
    """Give words back where a literal was read but text is wanted (``--set title=2024``); True if any."""
    kinds = {"string_type", "path_type"}
    keys = [tuple(map(str, each["loc"])) for each in error.errors() if each["type"] in kinds]
    found = [key for key in keys if key in words]
    for key in found:
        _put(data, key, words[key])
    return bool(found)


def _explain(
    model: type[BaseModel],
    data: Mapping[str, Any],
    error: ValidationError,
    file: Path | None,
    words: Mapping[Key, str],
) -> str:
    """All that is wrong, in one line."""
    lines: list[str] = []
    wrong: dict[str, tuple[list[str], str]] = {}
    for each in error.errors():
        loc = tuple(map(str, each["loc"]))
        if each["type"] == "extra_forbidden":
            allowed = _allowed(model, loc[:-1])
            near = difflib.get_close_matches(loc[-1], allowed, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            source = _source(loc, file, words)
            lines.append(f"{source}unknown key '{'.'.join(loc)}' ({hint}allowed: {', '.join(allowed)})")
        elif each["type"] == "missing":
            lines.append(f"{_source(loc, file, words)}{'.'.join(loc)}: {each['msg']}")
        else:
            place = _place(data, loc)
            name = f"{_source(place, file, words)}{'.'.join(place) or 'config'}"
            wrong.setdefault(name, ([], str(each["input"])[:80]))[0].append(each["msg"])
    lines += [f"{name}: {_any_of(messages)}, got {got!r}" for name, (messages, got) in wrong.items()]
    return "; ".join(lines)


def _source(key: Key, file: Path | None, words: Mapping[Key, str]) -> str:
    return "--set " if key in words else f"{file}: " if file else ""


def _place(data: Any, loc: Key) -> Key:
    """The part of a location that the data has: pydantic appends which alternative of a union it tried."""
    for depth, name in enumerate(loc):
        if isinstance(data, Mapping) and name in data:
            data = data[name]
        elif isinstance(data, list | tuple) and name.isdigit() and int(name) < len(data):
            data = data[int(name)]
        else:
            return loc[:depth]
    return loc


def _any_of(messages: Sequence[str]) -> str:
    """What each alternative of a union asks for, as one sentence."""
    start = "Input should be "
    if len(messages) == 1 or not all(message.startswith(start) for message in messages):
        return " or ".join(messages)
    return start + " or ".join(message.removeprefix(start).partition(",")[0] for message in messages)


def _allowed(model: type[BaseModel], loc: Key) -> list[str]:
    """The keys of the table at ``loc``."""
    for name in loc:
        field = model.model_fields.get(name)
        for kind in [field.annotation, *get_args(field.annotation)] if field else []:
            model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else model
    return sorted(model.model_fields)
