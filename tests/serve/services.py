"""A service on the micro base, with and without a socket, and what its tests send."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from hyperdreambooth.serve.app import create_app
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.run import check
from hyperdreambooth.serve.service import Service
from hyperdreambooth.serve.tasks import Studio
from hyperdreambooth.serve.worker import One


class Running:
    """A service without a socket: a client, and a worker that does a batch whenever a test says so."""

    def __init__(self, config: ServeConfig, studio: Studio, client: TestClient) -> None:
        self.config, self.client = config, client
        app: Any = client.app
        self.service: Service = app.state.service
        self.worker = One(config, studio, "cpu", "worker_test")

    @property
    def database(self) -> Database:
        return self.service.database

    def person(self, photo: bytes | None = None, **fields: Any) -> dict[str, Any]:
        """Asks for a person, and returns the job."""
        data = {"consent": "synthetic", **{name: str(value) for name, value in fields.items()}}
        answer = self.client.post("/v1/people", data=data, files={"photos": ("a.png", photo or face())})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def job(self, job: str) -> dict[str, Any]:
        return self.client.get(f"/v1/jobs/{job}").json()

    def work(self) -> None:
        """Works until nothing waits."""
        while self.worker.work_once():
            pass


def running_on(config: ServeConfig, studio: Studio) -> Iterator[Running]:
    check(config)
    with TestClient(create_app(config), base_url="http://127.0.0.1:8000") as client:
        made = Running(config, studio, client)
        yield made
        made.worker.close()


@contextmanager
def served(log: Path, words: Sequence[str], **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Runs `hdb serve` until the block ends; gives the process and the port.

    It writes a line for each request. They go to a file, because a pipe that nobody reads is full after a
    thousand of them, and the service then stands still.
    """
    command = [sys.executable, "-m", "hyperdreambooth", "serve", "--port", "0", *words]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, **options)
    try:
        yield process, _port(log, process)
    finally:
        process.terminate()
        try:
            process.wait()
        finally:  # the test took too long; the children of a process that was killed end by themselves
            process.kill()
            process.wait()


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    """Waits until the server says where it listens."""
    while (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return int(found[1])


def face(seed: int = 0, side: int = 48) -> bytes:
    """A picture of a few colours, as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
needs_postgres = pytest.mark.skipif(POSTGRES is None or os.name == "nt", reason="no PostgreSQL server here")


BOTH = pytest.mark.parametrize(
    "database_url", ["sqlite", pytest.param("postgres", marks=needs_postgres)], indirect=True
)
