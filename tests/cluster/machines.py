"""A Ray cluster on this machine: a head without cores, and nodes with a core and a make-believe GPU each."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
_STORE = 80 * 2**20  # bytes of each node's object store, the least that Ray allows
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # Ray's 15 lets a worker starve where anything else computes
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent), str(ROOT / "tests")]),
}


class Machines:
    """A running cluster: `address` is that of its head."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address

    def add(self, **variables: str) -> Any:
        """Starts a node with environment variables of its own."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return self._cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=_STORE)

    def kill(self, node: Any) -> None:
        """Kills all processes of a node at once."""
        self._cluster.remove_node(node, allow_graceful=False)


@contextmanager
def machines(nodes: int) -> Generator[Machines]:
    """Runs a cluster for the time of a block; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets have names of at most 107 characters
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**_SETTINGS, "RAY_TMPDIR": str(folder)}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": _STORE}
        # its exit hooks handle signals, which only the main thread may, but a test adds nodes from another
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            running = Machines(cluster)
            for _ in range(nodes):
                running.add()
            yield running
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
