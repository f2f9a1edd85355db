"""Compares what `hdb plan` says with what the stages then take, on this machine; writes results/plan.json.

    python benchmarks/plan.py                     # 96 rendered people: about ten minutes on two cores
    python benchmarks/plan.py --people 32 --steps 40

The plan is made first and rests on a few steps of each stage. Then rendered people are pre-optimised and a
hypernetwork is trained on them, each with every step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hyperdreambooth.apps.settings import PRESETS
from hyperdreambooth.avatars.folder import render_folder
from hyperdreambooth.base.load import load_base
from hyperdreambooth.files import write_json
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.train import train_hypernet
from hyperdreambooth.memory import skeleton
from hyperdreambooth.plan import PlanConfig, measure, stages
from hyperdreambooth.preopt.bank_training import preoptimize
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.runs import environment

RESULT = Path(__file__).parent / "results" / "plan.json"


def seconds(work: Callable[[], object]) -> float:
    """Returns the seconds of some work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(folder: Path, config: PlanConfig) -> dict[str, Any]:
    """Plans, then runs both stages, each in a new folder."""
    base = load_base(device="cpu")
    render_folder(folder / "photos", "train", config.people, config.photos, workers=1)
    speed = measure(base, skeleton(), config)
    planned = {stage.name: stage.seconds for stage in stages(skeleton(), config, speed)}
    photos, bank, network = folder / "photos", folder / "bank", folder / "hypernet"
    taken = {
        "preoptimize": seconds(lambda: preoptimize(base, photos, bank, config.preoptimize)),
        "train": seconds(lambda: train_hypernet(base, photos, network, config.train)),
    }
    rounded = {name: (round(planned[name], 1), round(took, 1)) for name, took in taken.items()}
    return {
        name: {"planned": before, "taken": took, "ratio": round(before / took, 3)}
        for name, (before, took) in rounded.items()
    }


def main() -> None:
    """Writes the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=96)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    recipe = tomllib.loads((PRESETS / "avatars.toml").read_text())
    config = PlanConfig(
        people=asked.people, photos=4,
        preoptimize=PreoptConfig(**{**recipe["preoptimize"], "steps": asked.steps}),
        train=HypernetConfig(**{**recipe["train"], "steps": 3 * asked.steps, "validate_every": asked.steps}),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        found = compare(Path(place), config)
    result = {
        "stages": found, "people": asked.people, "steps": asked.steps, "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "environment": environment(),
    }  # fmt: skip
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
