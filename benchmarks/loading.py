"""Measures whether the training of a hypernetwork waits for its data; writes results/loading.json.

`alone` loads batches and trains nothing: it draws people, photos, timesteps and noise, and collects latents,
features and tokens of 64 rendered people with four photos each, which were encoded before. `sd15` does the
same with latents and features of the sizes that SD 1.5 and `facebook/dinov2-small` make at 512 pixels.
`training` trains on these people. Every other step gets a batch that is there already, and returns at once
from loading; the medians of both kinds of steps are compared.

    python benchmarks/loading.py                  # a minute on one core
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hyperdreambooth.apps.settings import PRESETS
from hyperdreambooth.avatars.folder import render_folder
from hyperdreambooth.base import denoise
from hyperdreambooth.base.load import load_base
from hyperdreambooth.files import write_json
from hyperdreambooth.hypernet import train as stage
from hyperdreambooth.hypernet.config import HypernetConfig
from hyperdreambooth.hypernet.data import Faces
from hyperdreambooth.hypernet.setup import Training
from hyperdreambooth.runs import environment

RESULT = Path(__file__).parent / "results" / "loading.json"
PEOPLE, PHOTOS = 64, 4
GOAL = 90.0  # samples a second that a GPU shall train of SD 1.5 at 512 pixels; an H200 took 9.1 ms a sample
SKIPPED = 4  # steps in which everything is called for the first time


def load(training: Training, step: int) -> None:
    """Does everything that a step does before any network runs."""
    config, faces = training.config, training.faces
    key = (config.seed, "train", step)
    chosen = [
        stage.pick(faces, training.trained, config.photos, *key, place) for place in range(config.batch)
    ]
    batch = stage.collect(training.base, faces, chosen)
    denoise.sample_draw(training.base, tuple(batch.latents.shape[1:]), batch.keys, config)
    captions = [faces.captions[row] for one in chosen for row in one.targets]
    faces.conditioner.inputs(captions, config.photos)


def alone(training: Training, seconds: float) -> float:
    """Returns the samples that are loaded in a second."""
    for step in range(SKIPPED):
        load(training, step)
    began, step = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        load(training, step)
        step += 1
    return step * training.config.batch * training.config.photos / (time.perf_counter() - began)


def of_sd15(faces: Faces) -> Faces:
    """The same people with latents and features of other sizes."""
    m, draw = len(faces.latents), partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return replace(faces, latents=draw(m, 4, 64, 64), features=draw(m, 257, 384).half())


class AtOnce:
    """Makes functions return, while `on`, what they returned last."""

    on = False

    @contextmanager
    def of(self, module: Any, name: str) -> Generator[None]:
        """Patches a module's function for the length of the block."""
        function, kept = getattr(module, name), list[Any]()

        def call(*arguments: Any) -> Any:
            if not self.on:
                kept[:] = [function(*arguments)]
            return kept[0]

        with patch.object(module, name, call):
            yield


def compare(training: Training, *rest: Any) -> dict[str, float]:
    """Trains, and returns the samples a second of steps with the real loader and of those without."""
    moments, at_once, step_loss = list[float](), AtOnce(), stage.step_loss

    def step(*arguments: Any) -> Any:
        moments.append(time.perf_counter())
        at_once.on = len(moments) % 2 == 0
        return step_loss(*arguments)

    with ExitStack() as patches:
        patches.enter_context(patch.object(stage, "step_loss", step))
        for module, name in ((stage, "pick"), (stage, "collect"), (denoise, "sample_draw")):
            patches.enter_context(at_once.of(module, name))
        stage.train(training, *rest)
    took = [after - before for before, after in pairwise(moments)][SKIPPED:]
    samples = training.config.batch * training.config.photos
    real, ready = (samples / statistics.median(took[kind::2]) for kind in (0, 1))
    return {"samples_a_second": real, "with_a_loader_that_returns_at_once": ready, "ratio": real / ready}


def measure(steps: int, seconds: float, home: Path) -> dict[str, Any]:
    """Measures all of it, on the avatars' base."""
    render_folder(home / "photos", "train", PEOPLE, PHOTOS, workers=1)
    recipe = tomllib.loads((PRESETS / "avatars.toml").read_text())["train"]
    never = dict.fromkeys(("validate_every", "save_every", "log_every"), 10**6)
    config = HypernetConfig(**{**recipe, **never, "steps": steps, "validation": 0})
    found: dict[str, Any] = {}
    train = stage.train

    def measured(training: Training, *rest: Any) -> None:
        found["alone"] = {"samples_a_second": alone(training, seconds)}
        rate = alone(replace(training, faces=of_sd15(training.faces)), seconds)
        found["sd15"] = {"samples_a_second": rate, "over_the_goal": rate / GOAL}
        with patch.object(stage, "train", train):
            found["training"] = {**compare(training, *rest), "batch": training.config.batch}

    with patch.object(stage, "train", measured):
        stage.train_hypernet(load_base(device="cpu"), home / "photos", home / "out", config)
    return found


def main() -> None:
    """Reads the command line and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loader alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as home:
        found = measure(asked.steps, asked.seconds, Path(home))
    result = {**found, "people": PEOPLE, "photos": PHOTOS, "steps": asked.steps, "load": before}
    write_json(RESULT, {**result, "environment": environment()})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
