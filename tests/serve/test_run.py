"""`hdb serve` as users run it: a worker that dies is started again, and its job goes on."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from services import Running, face, served
from typer.testing import CliRunner

from commands import error, hdb
from hyperdreambooth.apps.cli import app
from hyperdreambooth.serve.auth import SCOPES, add_key, revoke_key


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


def test_the_operator_deletes_people_of_revoked_keys_and_of_none(running: Running) -> None:
    on = ("serve", "--data", running.config.data, "people")
    keyless = running.person()
    with running.database.write() as session:
        key = {"Authorization": f"Bearer {add_key(session, 'shop', SCOPES, 600, 9)}"}
    files = {"photos": ("a.png", face(1))}
    asked = running.client.post("/v1/people", data={"consent": "self"}, files=files, headers=key)
    running.work()
    with running.database.write() as session:
        revoke_key(session, "shop")
    lines = hdb(*on, "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [keyless["person"], asked.json()["person"]]
    assert lines[0].endswith("synthetic  no key") and lines[1].endswith("self       shop (revoked)")
    told = hdb(*on, "delete", *(line.split()[0] for line in lines)).stdout
    assert told.count("4 files") == 2 and told.count("left: 0") == 2
    assert not list(running.service.store.files.iterdir()) and hdb(*on, "list").stdout == ""
    assert "no such person" in error(*on, "delete", keyless["person"])


def test_settings_that_cannot_work_are_one_line(tmp_path: Path) -> None:
    on = ("serve", "--data", tmp_path / "data")
    assert "no API keys" in error(*on, "--host", "0.0.0.0")
    assert "database" in error(*on, "--database", "nonsense")
    assert "content_filter" in error(*on, "--set", "content_filter=os:nothing")
    assert "certificate" in error(*on, "--set", "certificate=x.pem")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_worker_that_dies_is_started_again(tmp_path: Path, models: dict[str, Any]) -> None:
    """The first worker hangs in the middle of its job (in the content filter), so it surely dies there."""
    words = ["--data", str(tmp_path / "data"), "--device", "cpu", "--base", models["base"]]
    words += ["--hypernet", models["hypernet"], "--set", "finetune.batch=1", "--set", "per_minute=1000000"]
    words += ["--set", "content_filter=hanging:once"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HANGING": str(tmp_path / "pid")}
    with served(tmp_path / "log", words, env=environment) as (process, port):
        job = ask(port, "POST", "/v1/people", {"photos": [uri()], "consent": "self", "steps": 9})
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert ask(port, "GET", f"/v1/jobs/{job['id']}")["status"] == "running"
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        while (now := ask(port, "GET", f"/v1/jobs/{job['id']}"))["status"] in ("queued", "running"):
            time.sleep(0.1)
        assert now["status"] == "succeeded" and now["result"]["steps"] == 9, now
        drawing = ask(port, "POST", "/v1/images/generations", {"prompt": "a face", "steps": 2})
        assert len(drawing["data"]) == 1
        last = children(process.pid)
        assert last
        process.terminate()
        process.wait()
        while any(map(runs, last)):  # they end with the service
            time.sleep(0.1)
    log = (tmp_path / "log").read_text()
    assert "the worker on cpu died" in log and "leaked" not in log


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


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for somebody to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
