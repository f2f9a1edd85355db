"""Where no Ray cluster answers, a command ends with one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hyperdreambooth.cluster.on_ray import OnRay
from hyperdreambooth.files import InputError

services = pytest.importorskip("ray._private.services")
pytestmark = pytest.mark.slow


def nothing() -> Callable[[object], object]:
    """A recipe that nobody comes to."""
    return lambda unit: unit


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9", "nonsense:x", "nonsense"])
def test_no_cluster_is_one_line(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    services.find_gcs_addresses.cache_clear()
    monkeypatch.setattr(services, "_find_address_from_flag", lambda _: set[str]())  # one may run beside this
    with pytest.raises(InputError, match=f"--cluster {address}: no Ray cluster there .*ray start --head"):
        list(OnRay(address)(nothing, [1]))
