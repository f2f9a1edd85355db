"""Rows by name: what they say, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyperdreambooth.config import load_config
from hyperdreambooth.evaluate import protocol
from hyperdreambooth.evaluate.config import EvaluateConfig, method_of
from hyperdreambooth.files import InputError
from trial import made


def test_rows_are_named_or_refused() -> None:
    config = EvaluateConfig(rows=("hyperdreambooth@7",), methods={"hyperdreambooth": {"steps": 3, "lr": 1.0}})
    assert method_of("hyperdreambooth@7", config).settings == {"steps": 7, "lr": 1.0}
    assert config.compared() == "hyperdreambooth@7"
    rows = ("base", "hyperdreambooth@7", "no-hypernetwork", "hyperdreambooth")
    assert EvaluateConfig(rows=rows).compared() == "no-hypernetwork"
    assert EvaluateConfig(rows=rows, against="base").compared() == "base"
    several = method_of("hyperdreambooth:photos=3,way=side_by_side@9", config)
    assert several.photos == 3 and several.settings == {"steps": 9, "lr": 1.0, "way": "side_by_side"}
    assert method_of("hyperdreambooth:start=shared", config).start == "shared"
    for rows, words in (
        (("magic",), "rows: expected one of .*, got 'magic'"),
        (("base@x",), "NAME@STEPS"),
        (("base:photos=0",), "photos: Input should be"),
        (("base:start=nowhere",), "start: Input should be"),
    ):
        with pytest.raises(InputError, match=words):
            protocol.methods_of(EvaluateConfig(rows=rows))
    with pytest.raises(InputError, match=r"methods: expected one of .*, got 'magic'"):
        protocol.methods_of(EvaluateConfig(methods={"magic": {}}))
    with pytest.raises(InputError, match="against"):
        protocol.methods_of(EvaluateConfig(against="lidb"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": (0, 1, 0)}, "seeds: .*each once"),
        ({"prompts": ("a face", "a face")}, "prompts: .*each once"),
        ({"prompts": ("a face", " ")}, "prompts: .*empty"),
    ],
)
def test_repeated_seeds_and_empty_prompts_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_config(EvaluateConfig, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows": ("second",)}, "second: expected another hypernetwork"),
        ({"rows": ("adapter",)}, "--adapter"),
        ({"rows": ("lidb",), "methods": {"lidb": {"stepz": 1}}}, "stepz"),
        ({"rows": ("base",), "methods": {"base": {"steps": 1}}}, "has no settings"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    home: Path, micro_photos: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        made(home, micro_photos, tmp_path, **fields)  # before any row is made
