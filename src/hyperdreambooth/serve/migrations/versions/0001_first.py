"""The first tables."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def column(name: str, kind: Any, **options: Any) -> Any:
    """A column that is never empty, unless the options say so."""
    nullable: bool = options.pop("nullable", False)
    return sa.Column(name, kind, nullable=nullable, **options)


def text(name: str, **options: Any) -> Any:
    """A column of text."""
    return column(name, sa.String(), **options)


def number(name: str, **options: Any) -> Any:
    """A column of numbers: times, for the most part."""
    return column(name, sa.Double(), **options)


def count(name: str, **options: Any) -> Any:
    """A column of whole numbers."""
    return column(name, sa.Integer(), **options)


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "keys", text("id", primary_key=True), text("name"), text("digest"), text("scopes"),
        count("per_minute"), count("people"), number("created"), number("revoked", nullable=True),
    )  # fmt: skip
    op.create_table(
        "people", text("id", primary_key=True), text("key"), text("consent"),
        column("keep_photos", sa.Boolean()), number("created"),
    )  # fmt: skip
    op.create_table(
        "jobs", count("seq", primary_key=True, autoincrement=True), text("id", unique=True), text("key"),
        text("kind"), text("state"), text("settings"), column("request", sa.JSON()),
        text("person", nullable=True), column("progress", sa.JSON()), column("result", sa.JSON()),
        text("error"), text("webhook"), text("idempotency", nullable=True), text("asked"), number("created"),
        number("started", nullable=True), number("ended", nullable=True), text("worker"), number("lease"),
        count("fence"), count("attempts"), sa.UniqueConstraint("key", "idempotency"),
    )  # fmt: skip
    op.create_index("waiting", "jobs", ["state", "seq"])
    op.create_table("worn", text("job", primary_key=True), text("person", primary_key=True))
    op.create_table(
        "files", text("id", primary_key=True), text("owner"), count("number"), text("kind"), text("hash"),
        count("bytes"), text("media"),
    )  # fmt: skip
    op.create_table(
        "deliveries", text("id", primary_key=True), text("job"), text("key"), text("url"),
        text("body"), count("attempts"), number("due"),
    )  # fmt: skip
    op.create_table("workers", text("id", primary_key=True), text("device"), text("base"), number("seen"))
    for table, name in (
        ("people", "key"), ("jobs", "key"), ("jobs", "person"), ("worn", "person"), ("files", "owner"),
        ("deliveries", "job"), ("deliveries", "due"),
    ):  # fmt: skip
        op.create_index(f"ix_{table}_{name}", table, [name])


def downgrade() -> None:
    """Drops the tables."""
    for table in ("workers", "deliveries", "files", "worn", "jobs", "people", "keys"):
        op.drop_table(table)
