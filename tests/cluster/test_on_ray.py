"""Units over Ray: the same results as in one process, also while machines die."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from machines import Machines, machines

from commands import SMALL, hdb
from hyperdreambooth.cluster.desk import in_order
from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.files import InputError

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines(2) as running:
        yield running


def bank_files(folder: Path) -> dict[str, bytes]:
    """Everything of a bank that must not depend on who made it."""
    files = [folder / "index.json", folder / "manifest.json", *folder.glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}


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
        [*OnRay(cluster.address)(partial(squares, 5), range(12, 20))]


def test_the_bank_of_a_cluster_is_that_of_one_process(
    cluster: Machines, micro_dir: Path, micro_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [micro_photos, "--base", micro_dir, *SMALL, "--steps", 3, "--set", "identities_per_batch=1"]
    hdb("preoptimize", *words, "--out", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)  # relative paths mean the same in the workers
    hdb("preoptimize", *words, "--out", "spread", "--cluster", cluster.address)
    assert bank_files(tmp_path / "alone") == bank_files(tmp_path / "spread")
    assert not (tmp_path / "spread" / "groups").exists()


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9", "nonsense:x", "nonsense"])
def test_no_cluster_is_one_line(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=f"--cluster {address}: no Ray cluster there .*ray start --head"):
        [*OnRay(address)(partial(squares, 0), [1])]
