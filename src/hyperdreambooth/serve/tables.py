"""The tables of the service. No picture, no weight and, once a job has ended, no prompt is in them."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import JSON, Index, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


def new_id(kind: str) -> str:
    """Returns an id that nobody can guess: `job_…`, `person_…`."""
    return f"{kind}_{secrets.token_hex(16)}"


class Table(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012 - SQLAlchemy's own declaration


class Key(Table):
    """An API key, of which only a hash is kept."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    digest: Mapped[str]
    scopes: Mapped[str]
    per_minute: Mapped[int]
    people: Mapped[int]
    created: Mapped[float]
    revoked: Mapped[float | None]


class Person(Table):
    """A person, who belongs to one key."""

    __tablename__ = "people"

    id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(index=True)
    consent: Mapped[str]
    keep_photos: Mapped[bool]
    created: Mapped[float]


class Job(Table):
    """A job. `seq` is the order of acceptance; `settings` are what jobs of one batch have in common."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("key", "idempotency"), Index("waiting", "state", "seq"))

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    key: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    state: Mapped[str]
    settings: Mapped[str]
    request: Mapped[dict[str, Any]]
    person: Mapped[str | None] = mapped_column(index=True)
    progress: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any]]
    error: Mapped[str]
    webhook: Mapped[str]
    idempotency: Mapped[str | None]
    asked: Mapped[str]  # a hash of the request, which a repeated idempotency key has to match
    created: Mapped[float]
    started: Mapped[float | None]
    ended: Mapped[float | None]
    worker: Mapped[str]
    lease: Mapped[float]
    fence: Mapped[int]
    attempts: Mapped[int]


class Worn(Table):
    """Whom the pictures of a job show."""

    __tablename__ = "worn"

    job: Mapped[str] = mapped_column(primary_key=True)
    person: Mapped[str] = mapped_column(primary_key=True, index=True)


class File(Table):
    """A file in the folder of its owner, a person or a job, named by the hash of its content."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    number: Mapped[int]  # the place among the files that were made together
    kind: Mapped[str]
    hash: Mapped[str]
    bytes: Mapped[int]
    media: Mapped[str]


class Delivery(Table):
    """A webhook that has not arrived yet."""

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(index=True)
    key: Mapped[str]
    url: Mapped[str]
    body: Mapped[str]
    attempts: Mapped[int]
    due: Mapped[float] = mapped_column(index=True)


class Worker(Table):
    """A worker process, and when it was last heard of."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str]
    base: Mapped[str]
    seen: Mapped[float]
