"""API keys: made once, kept as hashes, with scopes, a rate and a number of people."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from hyperdreambooth.files import InputError, write_bytes
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.tables import Key

SCOPES = ("people", "images", "metrics")
"""`people` makes and deletes people, `images` draws them, `metrics` reads the service's figures."""
_LOCAL = "local"


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        id: of the key; `local` where there are no keys.
        scopes: what the caller may do.
        per_minute: the requests that the caller may send in a minute.
        people: the people whom the caller may keep.
        waiting: the caller's jobs that may wait at a time.
    """

    id: str
    scopes: tuple[str, ...]
    per_minute: int
    people: int
    waiting: int


def add_key(session: Session, name: str, scopes: Sequence[str], per_minute: int, people: int) -> str:
    """Makes a key and returns its text, which is not kept and cannot be shown again.

    Raises:
        InputError: an unknown scope, no scope, or a name that another key has.
    """
    if not scopes or set(scopes) - set(SCOPES):
        raise InputError(f"scope: expected some of {', '.join(SCOPES)}, got {', '.join(scopes) or 'none'}")
    if not name.strip() or not name.isprintable():
        raise InputError(f"name: expected a name that can be printed, got {name!r}")
    if session.scalar(select(Key.id).where(Key.name == name, Key.revoked.is_(None))):
        raise InputError(f"name: there is a key {name!r} already; revoke it, or choose another name")
    # the secret has 256 random bits, so a fast hash is enough: nobody can try them all
    identity, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    session.add(Key(
        id=identity, name=name, digest=_digest(secret), scopes=",".join(dict.fromkeys(scopes)),
        per_minute=per_minute, people=people, created=time.time(), revoked=None,
    ))  # fmt: skip
    return f"hdb_{identity}_{secret}"


def revoke_key(session: Session, name: str) -> str:
    """Revokes a key, named by its name or id, and returns its id. Its people stay until they are deleted.

    Raises:
        InputError: there is no such key, or it is revoked already.
    """
    found = select(Key).where((Key.name == name) | (Key.id == name), Key.revoked.is_(None))
    key = session.scalar(found)
    if key is None:
        raise InputError(f"key {name!r}: no such key that is not revoked; hdb serve keys list shows all")
    key.revoked = time.time()
    return key.id


def keys(session: Session) -> list[Key]:
    """Returns all keys, oldest first."""
    return list(session.scalars(select(Key).order_by(Key.created)))


def caller(session: Session, header: str, config: ServeConfig) -> Caller | None:
    """Returns who sends an `Authorization` header; None for nobody who may.

    Where no key was ever made, everybody on this machine may do everything.
    """
    if config.on_loopback and session.scalar(select(Key.id).limit(1)) is None:
        return Caller(_LOCAL, SCOPES, config.per_minute, config.people, config.most_waiting)
    kind, _, text = header.partition(" ")
    prefix, _, rest = text.strip().partition("_")
    identity, _, secret = rest.partition("_")
    if kind.lower() != "bearer" or prefix != "hdb" or not identity.isalnum():
        return None
    key = session.get(Key, identity) if len(identity) == 16 and identity.isascii() else None
    known = key.digest if key is not None else _digest("")
    if not hmac.compare_digest(known, _digest(secret)) or key is None or key.revoked is not None:
        return None
    return Caller(key.id, tuple(key.scopes.split(",")), key.per_minute, key.people, config.waiting_of_a_key)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


class RateLimit:
    """A bucket of requests for each caller, which fills again in a minute."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, caller: Caller, now: float) -> float:
        """Takes a request out of the caller's bucket; returns the seconds to wait where it is empty, or 0."""
        left, last = self._buckets.get(caller.id, (float(caller.per_minute), now))
        left = min(caller.per_minute, left + (now - last) * caller.per_minute / 60)
        self._buckets[caller.id] = (left - 1 if left >= 1 else left, now)
        return 0.0 if left >= 1 else (1 - left) * 60 / caller.per_minute


def server_secret(data: Path) -> bytes:
    """Returns the secret from which those of webhooks are made; makes it on the first call."""
    file = data / "secret"
    if not file.exists():
        write_bytes(file, secrets.token_bytes(32))
        file.chmod(0o600)
    return file.read_bytes()


def webhook_secret(data: Path, key: str) -> str:
    """Returns the secret that signs a key's webhooks, as the Standard Webhooks specification writes it."""
    made = hmac.digest(server_secret(data), f"webhook {key}".encode(), "sha256")
    return f"whsec_{base64.b64encode(made).decode()}"
