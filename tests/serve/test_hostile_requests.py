"""Hostile requests: no 500, no file outside the data folder, bounded memory, nothing across keys."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hostile import Request, request
from services import Running, face, served

from hyperdreambooth.serve.auth import SCOPES, add_key
from hyperdreambooth.serve.database import Database

GROWTH = 400_000  # kB that the server may grow by under attack
_REFUSED = {"content-length"}  # the test client writes it itself


def test_hostile_requests_are_refused_in_a_sentence(running: Running) -> None:
    for number in range(240):
        asked = request(number)
        given = {
            name: value.encode("utf-8")
            for name, value in asked.headers.items()
            if name.lower() not in _REFUSED
        }
        answer = running.client.request(asked.method, asked.address, headers=given, content=asked.body)
        assert answer.status_code < 500, (number, asked, answer.text)
        if answer.status_code >= 400 and asked.method != "HEAD":
            assert answer.json()["error"]["message"], number
    assert {path.name for path in running.config.data.parent.iterdir()} == {"data"}


class Server:
    """`hdb serve` in a process, with its own home and folder for temporary files."""

    def __init__(self, home: Path, process: subprocess.Popen[bytes], port: int) -> None:
        self.home, self.data, self.process, self.port = home, home / "data", process, port

    def drain(self) -> str:
        """Ends the server, and returns what it wrote."""
        self.process.terminate()
        self.process.wait()
        return (self.home / "log").read_text()

    def memory(self) -> int:
        """The most memory that the process ever had, in kB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    def send(self, asked: Request, **more: str) -> int:
        """Sends a request as it is; returns the status, or 0 where the server closed the connection."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            link.putrequest(asked.method, asked.address, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(asked.body)), **asked.headers, **more}.items():
                link.putheader(name, value.encode("utf-8"))
            link.endheaders(asked.body)
            answer = link.getresponse()
            answer.read()
            return answer.status
        except (OSError, http.client.HTTPException, ValueError):
            return 0
        finally:
            link.close()


@pytest.fixture
def server(tmp_path: Path, models: dict[str, Any]) -> Iterator[Server]:
    words = ["--data", str(tmp_path / "data"), "--base", models["base"], "--hypernet", models["hypernet"]]
    words += ["--set", "devices=[]", "--set", "patience=10", "--set", "per_minute=1000000"]
    for name in ("home", "tmp", "cwd"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    with served(tmp_path / "log", words, cwd=tmp_path / "cwd", env=environment) as (process, port):
        yield Server(tmp_path, process, port)


def slow(server: Server, part: bytes) -> socket.socket:
    """Connects, sends the beginning of a request, and waits."""
    link = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    link.sendall(part)
    return link


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_two_thousand_hostile_requests(server: Server) -> None:
    database = Database(f"sqlite:///{server.data / 'service.db'}")
    with database.write() as session:
        mine, theirs = (add_key(session, name, SCOPES, 10**6, 10**6) for name in ("mine", "theirs"))
    database.close()
    body = (
        b'--x\r\nContent-Disposition: form-data; name="consent"\r\n\r\nself\r\n--x\r\nContent-Disposition: '
    )
    body += b'form-data; name="photos"; filename="a.png"\r\n\r\n' + face() + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert server.send(Request("POST", "/v1/people", kind, body), Authorization=f"Bearer {mine}") == 202
    owned = [folder.name for folder in (server.data / "files").iterdir()]
    before, counts = server.memory(), Counter[int]()
    waiting = [
        slow(server, part)
        for part in (
            b"",
            b"G",
            b"GET / HTTP/1.1\r\nX: ",
            b"POST /v1/people HTTP/1.1\r\nContent-Length: 9\r\n\r\n1",
        )
        for _ in range(5)
    ]
    for number in range(2000):
        asked = request(number)
        if number % 7 == 0:  # the id of somebody else's person
            asked = Request(asked.method, f"/v1/people/{owned[0]}", asked.headers, asked.body)
        status = server.send(
            asked, **({} if "Authorization" in asked.headers else {"Authorization": f"Bearer {theirs}"})
        )
        assert status < 500, (number, asked)
        assert number % 7 or status not in (200, 202), (number, asked)
        counts[status] += 1
    print(dict(counts), f"memory {before} -> {server.memory()} kB")
    assert server.memory() < before + GROWTH
    for link in waiting:  # the server ended them all
        with suppress(OSError):
            link.settimeout(30)
            while link.recv(9999):
                pass
        link.close()
    assert server.send(Request("GET", "/healthz")) == 200
    written = server.drain()
    assert "Traceback" not in written and "passwd" not in written
    outside = [
        path for name in ("home", "tmp", "cwd") for path in (server.home / name).rglob("*") if path.is_file()
    ]
    assert not outside, outside
    assert {path.name for path in server.home.iterdir()} == {"data", "home", "tmp", "cwd", "log"}
