"""Units over Ray: the same results as in one process, also while machines die."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from machines import Machines, machines

from banks import bank_files
from commands import SMALL, hdb
from hyperdreambooth.apps import elsewhere
from hyperdreambooth.apps.elsewhere import trainer
from hyperdreambooth.apps.settings import BaseConfig
from hyperdreambooth.cluster import on_ray
from hyperdreambooth.cluster.desk import in_order
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.events import read_events
from hyperdreambooth.files import InputError
from hyperdreambooth.preopt.config import PreoptConfig
from hyperdreambooth.preopt.groups import Group, Trained
from hyperdreambooth.storage import Store

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines(2) as running:
        yield running


def squares(offset: int) -> Callable[[int], int]:
    """A recipe."""

    def square(unit: int) -> int:
        if unit == 3:
            warnings.warn("three is odd", stacklevel=1)
        if unit == 13:
            raise InputError("unit 13: brings bad luck")
        return unit * unit + offset

    return square


def test_results_come_from_actors_and_their_warnings_too(cluster: Machines) -> None:
    with pytest.warns(UserWarning, match="three is odd"):
        results = OnRay(cluster.address)(partial(squares, 5), range(10), ahead=3, title="squares")
        assert [*in_order(results)] == [k * k + 5 for k in range(10)]


def test_what_a_worker_refuses_is_the_users_mistake(cluster: Machines) -> None:
    with pytest.raises(InputError, match=r"^unit 13: brings bad luck$"):
        list(OnRay(cluster.address)(partial(squares, 5), range(12, 20)))


def mortal_trainer(base: BaseConfig, out: Store, config: PreoptConfig) -> Callable[[Group], Trained]:
    """The recipe of `preoptimize`, but the worker that comes to the third person first is killed there."""
    train = trainer(base, out, config)

    def work(group: Group) -> Trained:
        died = out.here / "died"
        if group.names == ("person-2",) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train(group)

    return work


def test_the_bank_of_a_cluster_is_that_of_one_process(
    cluster: Machines, micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a worker is lost, which is told once: on standard error, and in the events of the run."""
    words = [micro_photos, "--base", micro_dir, *SMALL, "--steps", 3, "--set", "identities_per_batch=1"]
    hdb("preoptimize", *words, "--out", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)  # relative paths mean the same in the workers
    monkeypatch.setattr(elsewhere, "trainer", mortal_trainer)
    printed = hdb("preoptimize", *words, "--out", "spread", "--cluster", cluster.address).stderr.splitlines()
    assert bank_files(tmp_path / "alone") == bank_files(tmp_path / "spread")
    assert not (tmp_path / "spread" / "groups").exists()
    events = read_events(tmp_path / "spread" / "events.jsonl")
    assert [event["done"] for event in events if event["event"] == "unit"] == [1, 2, 3, 4, 5, 6]
    others = [event for event in events if event["event"] != "unit"]
    assert [event["event"] for event in others] == ["start", "lost", "end"]
    assert re.fullmatch(r"worker \d \(.*, ActorDiedError\); unit 2 is given out again", others[1]["what"])
    (line,) = [line for line in printed if "lost" in line]
    assert line == others[1]["what"].replace(");", ") is lost;")
    assert len(printed) == len(set(printed))
    assert f"lost         1, the last one: {others[1]['what']}" in hdb("watch", "spread").stdout


def stillborn() -> Callable[[int], int]:
    """A recipe that kills its worker, as too little memory would."""
    os.kill(os.getpid(), signal.SIGKILL)
    return lambda unit: unit


def test_workers_that_are_never_ready_end_the_command(
    cluster: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not started again for ever, and not as fast as that goes."""
    monkeypatch.setattr(on_ray, "LOSSES", 3)
    began = time.monotonic()
    with pytest.raises(OSError, match="3 workers died before they were ready"):
        list(OnRay(cluster.address)(stillborn, [1]))
    assert time.monotonic() - began > 2 * on_ray.LOOK
