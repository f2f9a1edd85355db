"""256 people on a head and three nodes: the bank of one process, also while nodes are killed 20 times."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import Machines, machines
from test_shards import bank_files

import micro
from hyperdreambooth.apps.elsewhere import trainer
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.base.load import load_base
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.preopt.bank_training import preoptimize
from hyperdreambooth.preopt.config import PreoptConfig

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.photos(tmp_path_factory.mktemp("crowd") / "photos", identities=256, each=1)


class Killer:
    """Kills a node of three at random, and starts another, whenever a result has come."""

    def __init__(self, cluster: Machines) -> None:
        self._cluster, self._rng, self.killed = cluster, random.Random(0), 0
        self._nodes = [cluster.add() for _ in range(3)]

    def strike(self) -> None:
        if self.killed < KILLS:
            place = self._rng.randrange(3)
            self._cluster.kill(self._nodes[place])
            self._nodes[place] = self._cluster.add()
            self.killed += 1

    def after_each(self, results: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        for result in results:
            yield result
            self.strike()


def test_whoever_dies_the_bank_is_that_of_one_process(micro_dir: Path, photos: Path, tmp_path: Path) -> None:
    config = PreoptConfig(down_dim=4, up_dim=3, steps=4, identities_per_batch=8)
    base, threads = load_base(micro_dir, "cpu"), torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor of one core
    try:
        preoptimize(base, photos, tmp_path / "alone", config)
    finally:
        torch.set_num_threads(threads)
    spread = tmp_path / "spread"
    recipe = partial(trainer, BaseConfig(base=str(micro_dir)), spread, config)
    with machines(0) as cluster:
        killer = Killer(cluster)

        def hand_out(groups: Any) -> Iterator[tuple[int, Any]]:
            return killer.after_each(OnRay(cluster.address)(recipe, groups, title="preoptimize"))

        bank = preoptimize(base, photos, spread, config, hand_out)
    assert killer.killed == KILLS
    assert len(bank) == 256
    assert bank_files(tmp_path / "alone") == bank_files(spread)
