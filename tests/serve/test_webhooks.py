"""Webhooks arrive signed, are tried again, and reach no private address that the operator did not name."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from services import Running, running_on
from sqlalchemy import func, select, update

from hyperdreambooth.files import InputError
from hyperdreambooth.serve import webhooks
from hyperdreambooth.serve.auth import webhook_secret
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.tables import Delivery
from hyperdreambooth.serve.tasks import Studio
from hyperdreambooth.serve.webhooks import Target, deliver, send, signed, target, verify


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps what comes, and answers with the statuses that it was told, in turn."""

    got: list[tuple[dict[str, str], bytes]]
    statuses: list[int]

    def do_POST(self) -> None:
        """Answers a message."""
        body = self.rfile.read(int(self.headers["content-length"]))
        self.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(self.statuses.pop(0))
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[Receiver]]]:
    handler = type("Own", (Receiver,), {"got": [], "statuses": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_the_end_of_a_job_is_told_until_it_arrives(
    config: ServeConfig, studio: Studio, receiver: tuple[str, type[Receiver]]
) -> None:
    host, handler = receiver
    handler.statuses = [500, 302, 200]
    allowed = config.model_copy(update={"webhook_hosts": (host,)})
    for running in running_on(allowed, studio):
        job = running.person(webhook=f"http://{host}/hook?x=1")
        running.work()
        for arrived in (0, 0, 1):
            due(running)
            assert deliver(running.database, allowed) == arrived
        assert len({headers["webhook-id"] for headers, _ in handler.got}) == 1
        headers, body = handler.got[-1]
        secret = webhook_secret(allowed.data, "local")
        told = json.loads(body)
        assert (told["type"], told["data"]["id"]) == ("job.succeeded", job["id"])
        assert verify(secret, headers, body)
        assert not verify(secret, headers, body + b" ")
        assert not verify(secret, headers, body, now=time.time() + 3600)  # a replay
        assert not verify("whsec_AAAA", headers, body)
        assert left(running) == 0


def due(running: Running) -> None:
    with running.database.write() as session:
        session.execute(update(Delivery).values(due=0.0))


def left(running: Running) -> int:
    with running.database.read() as session:
        return session.scalar(select(func.count()).select_from(Delivery)) or 0


def test_a_receiver_that_is_never_there_is_given_up(config: ServeConfig, studio: Studio) -> None:
    allowed = config.model_copy(update={"webhook_hosts": ("127.0.0.1:1",), "webhook_tries": 2})
    for running in running_on(allowed, studio):
        running.person(webhook="http://127.0.0.1:1/")
        running.work()
        assert deliver(running.database, allowed) == 0 and left(running) == 1
        assert deliver(running.database, allowed) == 0 and left(running) == 1  # not due again yet
        due(running)
        assert deliver(running.database, allowed) == 0 and left(running) == 0


def test_the_signature_is_the_standards() -> None:
    """The example of the Standard Webhooks specification's reference libraries."""
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", body, 1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "https://user:secret@example.org/",
        "file:///etc/passwd",
        "ftp://example.org/",
        "gopher://127.0.0.1/",
        "https://",
        "https://exa mple.org/",
        "https://[::1",
        "//example.org",
        "javascript:1",
        "https://example.org:99999/",
        "https://example.org/\r\nX: y",
    ],
)
def test_addresses_that_are_never_called(url: str) -> None:
    with pytest.raises(InputError, match="webhook"):
        target(url, ())


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "0.0.0.0",
        "::1",
        "fe80::1",
        "::ffff:127.0.0.1",
        "fd00::1",
        "224.0.0.1",
        "100.64.0.1",
        "2002:7f00:1::",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "::127.0.0.1",
        "fec0::1",
        "240.0.0.1",
    ],
)
def test_private_addresses_are_not_connected_to(address: str) -> None:
    with pytest.raises(InputError, match="private"):
        send(Target(address, 443, "/", True, False), {}, b"")


def test_a_receiver_that_answers_byte_by_byte_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_SECONDS", 1)
    ended = threading.Event()

    def drip(listening: socket.socket) -> None:
        link, _ = listening.accept()
        with link, suppress(OSError):  # until the sender leaves, or after a minute, which is a failure
            for _ in range(600):
                link.sendall(b"\0")
                time.sleep(0.1)
            ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        with pytest.raises(OSError):
            send(Target("127.0.0.1", listening.getsockname()[1], "/", False, True), {}, b"")
        thread.join()
    assert not ended.is_set()
