"""The pages' tables are what the results say, and every result is of an experiment that is there."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("experiment", ROOT / "benchmarks" / "experiment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiment"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_say_what_the_results_say(experiment: ModuleType) -> None:
    for page in experiment.PAGES:
        text = page.read_text(encoding="utf-8")
        names = [match["name"] for match in experiment.MARK.finditer(text)]
        assert names and all((ROOT / "benchmarks" / "results" / f"{name}.json").is_file() for name in names)
        assert experiment.tables(text) == text, "run: python benchmarks/experiment.py --tables"


def test_a_table_of_other_weights_says_so(experiment: ModuleType) -> None:
    note = "With that commit's weights"
    for page in experiment.PAGES:
        for match in experiment.MARK.finditer(page.read_text(encoding="utf-8")):
            told = json.loads((ROOT / "benchmarks" / "results" / f"{match['name']}.json").read_text())
            assert (note in match["table"]) == experiment.outdated(told)
    base, another = {"fingerprint": experiment.shipped()[0]}, {"fingerprint": "another", "strength": 1}
    assert experiment.outdated({"experiment": "avatars", "base": base, "network": another})
    assert not experiment.outdated({"experiment": "plain", "base": base, "network": another})
    assert experiment.outdated({"experiment": "plain", "base": another, "network": another})
    assert note not in (ROOT / "README.md").read_text(encoding="utf-8"), "run README's experiment again"
    assert "network" in experiment.KEPT


def test_a_table_that_differs_is_seen(experiment: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = experiment.MARK.search(text)
    assert match is not None
    changed = text.replace(match["table"], match["table"].replace("| base |", "| better |"))
    assert experiment.tables(changed) == text != changed


def test_every_experiment_names_a_preset_and_every_result_an_experiment() -> None:
    from hyperdreambooth.apps.avatars import RenderConfig
    from hyperdreambooth.apps.settings import PRESETS
    from hyperdreambooth.config import load_config
    from hyperdreambooth.evaluate.config import EvaluateConfig, methods_of

    recipes = {
        file.stem: tomllib.loads(file.read_text()) for file in (ROOT / "benchmarks/experiments").iterdir()
    }
    for recipe in recipes.values():
        assert (
            {"preset", "photos", "set"} <= recipe.keys() <= {"preset", "photos", "set", "sheets", "hypernet"}
        )
        preset = tomllib.loads((PRESETS / f"{recipe['preset']}.toml").read_text())
        assert methods_of(load_config(EvaluateConfig, **{**preset["evaluate"], **recipe["set"]}))
        RenderConfig(**recipe["photos"])
    assert recipes["paper"]["set"]["prompts"] == recipes["paper-alone"]["set"]["prompts"]  # one experiment
    sheets = [f"{name}-{row}.jpg" for name, recipe in recipes.items() for row in recipe.get("sheets", ())]
    assert all((ROOT / "docs" / sheet).is_file() for sheet in sheets)
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        told = json.loads(file.read_text())
        if name := told.get("experiment"):
            assert name in recipes and {"commit", "torch"} <= told["environment"].keys() and told["machine"]
