"""A service on the micro base: its settings, a warm studio for all tests, and databases of both kinds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import POSTGRES, Running, running_on

import micro
from hyperdreambooth.base.load import load_base
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.tasks import Studio


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, micro_dir: Path) -> dict[str, Any]:
    """The micro base and a hypernetwork on it, as settings name them."""
    made = micro.hypernet(tmp_path_factory.mktemp("serve"), load_base(micro_dir, device="cpu"))
    finetune = {"steps": 2, "batch": 1}
    return {"base": str(micro_dir), "hypernet": str(made), "devices": ["cpu"], "finetune": finetune}


@pytest.fixture
def config(tmp_path: Path, models: dict[str, Any]) -> ServeConfig:
    """Settings of a service in a folder of its own."""
    return ServeConfig(data=tmp_path / "data", **models)


@pytest.fixture(scope="session")
def studio(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """What a worker keeps warm."""
    return Studio(ServeConfig(data=tmp_path_factory.mktemp("unused"), **models), "cpu")


@pytest.fixture
def running(config: ServeConfig, studio: Studio) -> Iterator[Running]:
    yield from running_on(config, studio)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Starts a PostgreSQL server of its own, on a socket in a folder, and gives the URL of its databases."""
    assert POSTGRES is not None
    # in no folder of pytest's: it closes them to other users, and the server refuses root
    home = Path(tempfile.mkdtemp())
    user = "nobody" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(home, user)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={home}", "-c", "fsync=off"]

    def run(program: str, *words: str) -> subprocess.Popen[bytes]:
        with (home / "log").open("ab") as log:
            return subprocess.Popen([POSTGRES / program, *words], user=user, cwd=home, stdout=log, stderr=log)

    made = run("initdb", "-D", str(home / "db"), "-U", "tester", "-A", "trust", "-N").wait()
    assert made == 0, (home / "log").read_text()
    # a child of this process, not a daemon: so it ends with the tests, however they end
    server = run("postgres", "-D", str(home / "db"), *options)
    try:
        while run("pg_isready", "-q", "-h", str(home)).wait() != 0:
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        yield f"postgresql+psycopg://tester@/postgres?host={home}"
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()
        shutil.rmtree(home)


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of the kind that the test's parameter names."""
    if request.param == "sqlite":
        return ""
    from sqlalchemy import create_engine, text

    engine = create_engine(request.getfixturevalue("postgres"), isolation_level="AUTOCOMMIT")
    name = f"t{os.urandom(6).hex()}"
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return str(request.getfixturevalue("postgres")).replace("/postgres?", f"/{name}?")
