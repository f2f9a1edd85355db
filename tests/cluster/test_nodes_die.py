"""256 people on a head and three nodes: the bank of one process, also while nodes are killed 20 times."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import Machines, machines

import micro
from banks import bank_files
from hyperdreambooth.apps.elsewhere import trainer
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.base.load import load_base
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.preopt.bank_training import fill_bank, preoptimize
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.storage import Store

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.photos(tmp_path_factory.mktemp("crowd") / "photos", identities=256, each=1)


def marking(recipe: Callable[[], Callable[[Any], Any]], folder: Path) -> Callable[[Any], Any]:
    """A recipe whose worker says by a file that its node is at work, and holds its result until it may pass.

    So a job cannot end before all nodes are killed that should be, however fast or busy the machine is.
    """
    work, mark = recipe(), folder / os.environ["NODE"]
    free, own = folder / "free", folder / f"pass-{os.environ['NODE']}"

    def do(unit: Any) -> Any:
        mark.touch()
        result = work(unit)
        while not free.exists() and not own.exists():
            time.sleep(0.02)
        own.unlink(missing_ok=True)
        mark.unlink()
        return result

    return do


class Killer(threading.Thread):
    """Kills nodes that are at work, at random moments, and starts others; lets some units pass."""

    def __init__(self, cluster: Machines, marks: Path) -> None:
        super().__init__()
        self._cluster, self._marks, self._rng = cluster, marks, random.Random(0)
        self.ended, self.killed = threading.Event(), 0
        self._nodes = {str(k): cluster.add(NODE=str(k)) for k in range(3)}

    def run(self) -> None:
        while self.killed < KILLS and not self.ended.wait(0.05):
            if at_work := [name for name in self._nodes if (self._marks / name).exists()]:
                self.ended.wait(self._rng.uniform(0, 1))
                name = self._rng.choice(at_work)
                if self._rng.random() < 0.6:
                    self._strike(name)
                else:
                    (self._marks / f"pass-{name}").touch()
        (self._marks / "free").touch()

    def _strike(self, name: str) -> None:
        self._cluster.kill(self._nodes.pop(name))
        self.killed += 1
        successor = str(self.killed + 2)
        self._nodes[successor] = self._cluster.add(NODE=successor)


def test_whoever_dies_the_bank_is_that_of_one_process(micro_dir: Path, photos: Path, tmp_path: Path) -> None:
    config = PreoptConfig(down_dim=4, up_dim=3, steps=4, identities_per_batch=8)
    base, threads = load_base(micro_dir, "cpu"), torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor of one core
    try:
        preoptimize(base, photos, tmp_path / "alone", config)
    finally:
        torch.set_num_threads(threads)
    spread, marks = tmp_path / "spread", tmp_path / "marks"
    marks.mkdir()
    recipe = partial(marking, partial(trainer, BaseConfig(base=str(micro_dir)), Store(spread), config), marks)
    with machines(0) as cluster:
        killer = Killer(cluster, marks)
        killer.start()
        try:
            hand_out = partial(OnRay(cluster.address), recipe, title="preoptimize")
            bank = fill_bank(base, photos, spread, config, hand_out)
        finally:
            killer.ended.set()
            killer.join()
    assert killer.killed == KILLS
    assert len(bank) == 256
    assert bank_files(tmp_path / "alone") == bank_files(spread)
