"""Settings: file, then --set, then flags; every mistake is one line that names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from hyperdreambooth.config import load_config
from hyperdreambooth.files import InputError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Loss(Strict):
    alpha: float = 1.0
    kind: Literal["weights", "products"] = "products"


class Config(Strict):
    steps: int = Field(default=10, ge=1)
    lr: float = 1e-3
    title: str | None = None
    folder: Path = Path(".")
    ranks: list[int] = [1]
    ema: bool = False
    loss: Loss = Loss()
    second: Loss | None = None
    until: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_defaults() -> None:
    assert load_config(Config) == Config()


@pytest.mark.parametrize("name", ["model", "file", "sets"])
def test_a_field_may_be_called_what_a_parameter_is(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown key '{name}'"):
        load_config(Config, **{name: "x"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'steps = 5\ntitle = "é"\n[loss]\nalpha = 2\n'),
        ("a.yaml", "steps: 5\ntitle: é\nloss:\n  alpha: 2\n"),
        ("a.YML", "{steps: 5, title: é, loss: {alpha: 2}}"),
        ("a.json", '{"steps": 5, "title": "é", "loss": {"alpha": 2}}'),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    found = load_config(Config, write(tmp_path, name, text))
    assert found == Config(steps=5, title="é", loss=Loss(alpha=2))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    for name in ("a.toml", "a.yaml"):
        assert load_config(Config, write(tmp_path, name, "")) == Config()


def test_set_beats_the_file_and_flags_beat_both(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", "steps = 5\nlr = 0.5\n[loss]\nalpha = 2\nkind = 'weights'")
    found = load_config(Config, file, ["steps=6", "loss.alpha=3", "second.alpha=4"], steps=7, lr=None)
    assert found == Config(steps=7, lr=0.5, loss=Loss(alpha=3, kind="weights"), second=Loss(alpha=4))
    assert load_config(Config, None, ["steps=6", "steps = 8"]).steps == 8


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("ema=true", "ema", True),
        ("lr=1e-4", "lr", 1e-4),
        ("lr=inf", "lr", float("inf")),
        ("ranks=[1, 2]", "ranks", [1, 2]),
        ("title=null", "title", None),
        ("title='a = b'", "title", "a = b"),
        ("title=a [V] face, x=y", "title", "a [V] face, x=y"),
        ("title=", "title", ""),
        ("title=2024", "title", "2024"),
        ("title=2024-01-01", "title", "2024-01-01"),
        ("title=1\nsteps=3", "title", "1\nsteps=3"),
        ("folder=2024", "folder", Path("2024")),
        ('loss={"alpha": 5}', "loss", Loss(alpha=5)),
    ],
)
def test_literals(item: str, key: str, value: Any) -> None:
    assert load_config(Config, None, [item]) == Config(**{key: value})


@given(st.text())
def test_any_text_is_a_text_or_a_literal(words: str) -> None:
    try:
        assert isinstance(load_config(Config, None, [f"title={words}"]).title, str | None)
    except InputError as error:
        assert "title" in str(error)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["step=5"], "--set unknown key 'step' (did you mean 'steps'? allowed: ema, folder, loss, lr"),
        (["loss.beta=5"], "--set unknown key 'loss.beta' (allowed: alpha, kind)"),
        (["second.alpa=5"], "--set unknown key 'second.alpa' (did you mean 'alpha'? allowed: alpha, kind)"),
        (["steps=0"], "--set steps: Input should be greater than or equal to 1, got '0'"),
        (["steps=many"], "--set steps: Input should be a valid integer"),
        (["loss.kind=x"], "--set loss.kind: Input should be 'weights' or 'products', got 'x'"),
        (["until=x"], "--set until: Input should be a valid integer or 'auto', got 'x'"),
        (["ranks=[1,x]"], "--set ranks: Input should be a valid list"),
        (['ranks=[1,"x"]'], "ranks.1: Input should be a valid integer, unable to parse"),
        (["title=[1]", "steps=0"], "--set steps: Input should be greater"),
        (["steps"], "--set steps: expected key=value"),
        (["=3"], "--set =3: expected key=value"),
        (["a..b=3"], "--set a..b=3: expected key=value"),
        (["lr=1", "lr.x=1"], "--set lr.x: 'lr' is a value, not a table"),
    ],
)
def test_bad_sets(sets: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Config, None, sets)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "a.toml", "step = 5\nlr = 'x'")
    with pytest.raises(InputError) as caught:
        load_config(Config, file, ["ema=7"])
    text = str(caught.value)
    assert f"{file}: unknown key 'step'" in text and f"{file}: lr: " in text and "--set ema: " in text


def test_a_missing_key_is_named() -> None:
    class Needs(Strict):
        name: str

    with pytest.raises(InputError, match="name: Field required"):
        load_config(Needs)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "steps = ", "cannot read the config"),
        ("a.yaml", "a: [", "cannot read the config"),
        ("a.yaml", "!!python/object/apply:os.system ['echo no']", "cannot read the config"),
        ("a.yaml", "- 1", "expected keys and values, got list"),
        ("a.json", "{", "cannot read the config"),
        ("a.txt", "steps = 1", "expected a config file that ends in .toml, .yaml"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Config, write(tmp_path, name, text))
    assert f"{name}: {words}" in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.toml: no such file"):
        load_config(Config, tmp_path / "b.toml")
    (tmp_path / "c.toml").mkdir()
    with pytest.raises(InputError, match=r"c\.toml: cannot read"):
        load_config(Config, tmp_path / "c.toml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "title = 'é'\r\nsteps = 3"),
        ("a.yaml", "title: é\r\nsteps: 3"),
        ("a.json", '{"title": "é", "steps": 3}'),
    ],
)
def test_files_of_any_editor(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    config = load_config(Config, tmp_path / name)
    assert (config.title, config.steps) == ("é", 3)
