"""The pages' tables are made from the results, and every result belongs to an experiment."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from hyperdreambooth.evaluate.protocol import TRAINING

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


def test_a_table_of_other_weights_or_another_training_says_so(experiment: ModuleType) -> None:
    weights, training = "With that commit's weights", "would train other weights"
    for page in experiment.PAGES:
        for match in experiment.MARK.finditer(page.read_text(encoding="utf-8")):
            result = json.loads((ROOT / "benchmarks" / "results" / f"{match['name']}.json").read_text())
            assert (weights in match["table"]) == experiment.of_other_weights(result)
            assert (training in match["table"]) == experiment.of_other_training(result)
    base, another = {"fingerprint": experiment.shipped()[0]}, {"fingerprint": "another", "strength": 1}
    assert experiment.of_other_weights({"experiment": "avatars", "base": base, "network": another})
    assert not experiment.of_other_weights({"experiment": "plain", "base": base, "network": another})
    assert experiment.of_other_weights({"experiment": "plain", "base": another, "network": another})
    trained, bare = {"x": {"cost": {"steps": 25}}}, {"x": {"cost": {"steps": 0}}, "y": {"cost": {}}}
    assert experiment.of_other_training({"rows": trained})  # a result from before there was a number
    assert not experiment.of_other_training({"rows": trained, "training": TRAINING})
    assert not experiment.of_other_training({"rows": bare})
    assert weights not in (ROOT / "README.md").read_text(encoding="utf-8"), "run README's experiment again"
    assert {"network", "training"} <= set(experiment.KEPT)


def test_a_table_has_the_seconds_of_a_person_made_together_and_alone(experiment: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "paper-alone.json").read_text())
    made = experiment.table(result)
    assert "a person's share of the seconds when 16 people are made together" in made
    cells = {line.split(" | ")[0]: line.rstrip(" |").split(" | ")[-2:] for line in made.splitlines()}
    assert cells["| dreambooth"][0] == "–" and float(cells["| dreambooth"][1]) > 100
    assert float(cells["| hyperdreambooth"][0]) < 10


def test_a_table_that_differs_is_seen(experiment: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = experiment.MARK.search(text)
    assert match is not None
    changed = text.replace(match["table"], match["table"].replace("| base |", "| better |"))
    assert experiment.tables(changed) == text != changed


def test_every_experiment_names_a_preset_and_every_result_an_experiment() -> None:
    from hyperdreambooth.apps.settings import PRESETS, RenderConfig
    from hyperdreambooth.config import load_config
    from hyperdreambooth.evaluate.config import EvaluateConfig, methods_of

    recipes = {
        file.stem: tomllib.loads(file.read_text()) for file in (ROOT / "benchmarks/experiments").iterdir()
    }
    for recipe in recipes.values():
        needed, optional = {"preset", "photos", "set"}, {"sheets", "plots", "plotted", "hypernet", "notes"}
        assert needed <= recipe.keys() <= needed | optional
        preset = tomllib.loads((PRESETS / f"{recipe['preset']}.toml").read_text())
        assert methods_of(load_config(EvaluateConfig, **{**preset["evaluate"], **recipe["set"]}))
        RenderConfig(**recipe["photos"])
    assert recipes["paper"]["set"]["prompts"] == recipes["paper-alone"]["set"]["prompts"]  # one experiment
    sheets = [f"{name}-{row}.jpg" for name, recipe in recipes.items() for row in recipe.get("sheets", ())]
    plots = [f"{name}-{plot}.png" for name, recipe in recipes.items() for plot in recipe.get("plots", ())]
    assert all((ROOT / "docs" / picture).is_file() for picture in sheets + plots)
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(file.read_text())
        if name := result.get("experiment"):
            assert name in recipes and result["machine"]
            assert {"commit", "torch"} <= result["environment"].keys()


def test_the_page_of_the_families_says_what_fits_where() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    memory = importlib.import_module("memory")
    sys.path.remove(str(ROOT / "benchmarks"))
    results = json.loads(memory.RESULTS.read_text())
    text = memory.PAGE.read_text(encoding="utf-8")
    assert memory.MARK.search(text) and memory.page(text, results) == text, "run: python benchmarks/memory.py"
    told = {name: base["told_gib"] for name, base in results["bases"].items()}
    assert max(told[name]["personalize, int8"] for name in ("Z-Image", "FLUX.2 klein 4B")) < 15  # of 16 GB
    assert told["Qwen-Image"]["personalize, nf4"] < 22  # of 24 GB
