"""Webhooks: a job's end is told to its caller's server, signed as Standard Webhooks are.

A message is a row that was written together with the end of its job, so none is lost. It may arrive twice (if
the service is killed between sending and noting it), always with the same id. The address is the only thing
of a caller's that the service ever opens: https, and no address of a private network, unless the operator
named the host.
"""

from __future__ import annotations

import base64
import hmac
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqlalchemy import delete, select

from hyperdreambooth.files import InputError
from hyperdreambooth.serve.auth import webhook_secret
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.tables import Delivery

TOLERANCE = 300  # seconds by which the clock of a receiver may differ; an older message is a replay
_SECONDS = 10  # for each of: connecting, TLS, sending, the answer's first line
_TOGETHER = 8  # messages on their way at a time, so that a slow receiver delays few others
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses, as networks without IPv4 write them
_FIRST, _LAST = 5.0, 3600.0  # seconds until a message is tried again: doubled each time, up to an hour


@dataclass(frozen=True)
class Target:
    """Where a webhook goes: a name, the port, and whether the operator allowed it by name."""

    host: str
    port: int
    path: str
    tls: bool
    named: bool


def target(url: str, allowed: tuple[str, ...]) -> Target:
    """Reads the address of a webhook.

    Raises:
        InputError: not an address that may be called.
    """
    try:
        parts = urlsplit(url)
        host, tls = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
    except ValueError:
        raise InputError("webhook: expected an https URL") from None
    named = host in allowed or f"{host}:{port}" in allowed
    odd = not url.isascii() or not url.isprintable() or " " in url
    if not host or parts.username is not None or odd or not (tls or (named and parts.scheme == "http")):
        raise InputError("webhook: expected an https URL without a password")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(host, port, path, tls, named)


def _address(where: Target) -> str:
    """Returns the IP address to connect to. It is looked up once, so it cannot change after the check."""
    found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    if not where.named and not all(_is_public(one) for one in addresses):
        raise InputError("webhook: the host has a private address; the operator can allow it by its name")
    return addresses[0]


def _is_public(address: str) -> bool:
    known = ipaddress.ip_address(address.partition("%")[0])
    if known in _NAT64:
        return _is_public(str(ipaddress.IPv4Address(int(known) & 0xFFFFFFFF)))
    inner = getattr(known, "ipv4_mapped", None) or getattr(known, "sixtofour", None)
    odd = known.is_multicast or known.is_reserved or getattr(known, "is_site_local", False)
    return known.is_global and not odd and (inner is None or inner.is_global)


def send(where: Target, headers: Mapping[str, str], body: bytes) -> int:
    """Posts a message; follows no redirect, and returns the status. The rest of the answer is not read.

    Raises:
        OSError: the receiver cannot be reached.
        InputError: its address is private.
    """
    plain = socket.create_connection((_address(where), where.port), _SECONDS)
    with plain:
        connection = http.client.HTTPConnection(where.host, where.port, timeout=_SECONDS)
        tls = ssl.create_default_context() if where.tls else None
        connection.sock = tls.wrap_socket(plain, server_hostname=where.host) if tls else plain
        try:
            connection.request("POST", where.path, body, dict(headers))
            return _status(connection.sock)
        except http.client.HTTPException as error:
            raise OSError(type(error).__name__) from None
        finally:
            connection.close()


def _status(link: socket.socket) -> int:
    """Reads the status. A receiver that sends byte after byte has no longer than one that sends nothing."""
    got, until = b"", time.monotonic() + _SECONDS
    while len(got) < len("HTTP/1.1 200"):
        link.settimeout(max(0.001, until - time.monotonic()))
        part = link.recv(64)
        if not part:
            raise OSError("no answer")
        got += part
    found = re.match(rb"HTTP/1\.[01] (\d{3})", got)
    if found is None:
        raise OSError("no HTTP")
    return int(found[1])


def signed(secret: str, message: str, body: bytes, now: float) -> dict[str, str]:
    """Returns the headers of a message, by the Standard Webhooks specification (standardwebhooks.com)."""
    stamp = str(int(now))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{message}.{stamp}.".encode() + body, "sha256")
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {
        "content-type": "application/json", "user-agent": "hyperdreambooth", "webhook-id": message,
        "webhook-timestamp": stamp, "webhook-signature": signature,
    }  # fmt: skip


def verify(secret: str, headers: Mapping[str, str], body: bytes, now: float | None = None) -> bool:
    """For receivers: returns whether a message is this service's, whole and not older than five minutes.

    A receiver that remembers the ids of five minutes refuses every replay.

    Args:
        secret: what `hdb serve keys add` printed beside the key.
        headers: of the request, with names in lower case.
        body: of the request, as it came.
        now: seconds since 1970; None for the clock.
    """
    stamp = headers.get("webhook-timestamp", "")
    if not (stamp.isdecimal() and stamp.isascii() and len(stamp) < 12):
        return False
    if abs(int(stamp) - (time.time() if now is None else now)) > TOLERANCE:
        return False
    expected = signed(secret, headers.get("webhook-id", ""), body, int(stamp))["webhook-signature"]
    given = headers.get("webhook-signature", "").split(" ")
    return any(hmac.compare_digest(expected.encode(), one.encode()) for one in given)


def deliver(database: Database, config: ServeConfig) -> int:
    """Sends the messages that are due, and returns how many arrived."""
    with database.write() as session:  # whoever takes a message puts off the next try before the first
        due = session.scalars(select(Delivery).where(Delivery.due <= time.time()).limit(20)).all()
        for one in due:
            one.attempts += 1
            one.due = time.time() + min(_LAST, _FIRST * 2**one.attempts)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        return sum(pool.map(lambda one: _deliver(database, config, one), due))


def _deliver(database: Database, config: ServeConfig, message: Delivery) -> bool:
    arrived = _sent(message, config)
    if arrived or message.attempts >= config.webhook_tries:
        with database.write() as session:
            session.execute(delete(Delivery).where(Delivery.id == message.id))
    return arrived


def _sent(message: Delivery, config: ServeConfig) -> bool:
    body = message.body.encode()
    headers = signed(webhook_secret(config.data, message.key), message.id, body, time.time())
    try:
        return 200 <= send(target(message.url, config.webhook_hosts), headers, body) < 300
    except (OSError, InputError, UnicodeError):
        return False
