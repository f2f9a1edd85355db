"""`hdb serve` as users run it: a worker that dies is started again, and its job goes on."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from services import face
from typer.testing import CliRunner

from commands import error
from hyperdreambooth.apps.cli import app


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["serve", "--data", str(tmp_path / "data"), "keys", *words])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    made = run("add", "shop", "--scope", "people", "--per-minute", "5")
    assert re.search(r"key: hdb_[0-9a-f]{16}_\S{43}\nwebhook secret: whsec_\S{44}\n", made)
    assert "shop" in (listed := run("list")) and "5 a minute" in listed
    run("revoke", "shop")
    assert "revoked" in run("list")
    on = ("serve", "--data", tmp_path / "data", "keys")
    assert "no such key" in error(*on, "revoke", "shop")
    assert "scope" in error(*on, "add", "x", "--scope", "everything")


def test_settings_that_cannot_work_are_one_line(tmp_path: Path) -> None:
    on = ("serve", "--data", tmp_path / "data")
    assert "no API keys" in error(*on, "--host", "0.0.0.0")
    assert "database" in error(*on, "--database", "nonsense")
    assert "content_filter" in error(*on, "--set", "content_filter=os:nothing")
    assert "certificate" in error(*on, "--set", "certificate=x.pem")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_worker_that_dies_is_started_again(tmp_path: Path, models: dict[str, Any]) -> None:
    words = ["--data", str(tmp_path / "data"), "--port", "0", "--device", "cpu", "--base", models["base"]]
    words += ["--hypernet", models["hypernet"], "--set", "finetune.batch=1"]
    command = [sys.executable, "-m", "hyperdreambooth", "serve", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the server did not start"
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        port = int(found[1])
        job = ask(port, "POST", "/v1/people", {"photos": [uri()], "consent": "self", "steps": 200})
        while ask(port, "GET", f"/v1/jobs/{job['id']}")["progress"].get("stage") != "finetune":
            time.sleep(0.05)
        os.kill(largest_child(process.pid), signal.SIGKILL)
        while (now := ask(port, "GET", f"/v1/jobs/{job['id']}"))["status"] in ("queued", "running"):
            time.sleep(0.2)
        assert now["status"] == "succeeded" and now["result"]["steps"] == 200
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert not children(process.pid)


def uri() -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(face()).decode()}"


def ask(port: int, method: str, address: str, body: Any = None) -> dict[str, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as link:
        headers = {"Content-Type": "application/json"}
        link.request(method, address, None if body is None else json.dumps(body), headers)
        return json.loads(link.getresponse().read())


def children(parent: int) -> list[int]:
    """The processes that a process started, in any of its threads."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(word) for file in lists for word in file.read_text().split()]


def largest_child(parent: int) -> int:
    """The child with the most memory: the worker, which holds a model."""
    return max(children(parent), key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
