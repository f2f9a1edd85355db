"""Deleting: everything of a person, and what is older than it has to be."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.queue import ENDED
from hyperdreambooth.serve.store import Store
from hyperdreambooth.serve.tables import Delivery, File, Job, Key, Person, Worn


def delete_person(database: Database, store: Store, person: str, key: str | None) -> dict[str, Any] | None:
    """Deletes a person with every file, row and picture; None for a person of somebody else, or nobody.

    `key` is whose the person has to be; None, for the operator, deletes anybody's.

    What is deleted: photos, adapters, pictures that show the person (alone or with others), the jobs that
    made all of these, and webhooks that have not arrived. A job that is running loses its row, so its worker
    may publish nothing any more.

    Returns:
        What was removed, and what a search found afterwards: nothing.
    """
    with database.write() as session:
        owner = session.scalar(select(Person.key).where(Person.id == person))
        if owner is None or key not in (None, owner):
            return None
        jobs = list(session.scalars(select(Worn.job).where(Worn.person == person)))
        jobs += session.scalars(select(Job.id).where(Job.person == person))
        owners = [person, *jobs]
        files = [
            {"kind": file.kind, "sha256": file.hash, "bytes": file.bytes}
            for file in session.scalars(select(File).where(File.owner.in_(owners)))
        ]
        rows = _delete_rows(session, owners)
    for owner in owners:
        store.remove(owner)
    with database.write() as session:  # a worker may have prepared files for a job that is no more
        store.sweep(session)
    database.scrub()
    return {
        "object": "person.deleted", "id": person, "deleted": True, "files": files, "rows": rows,
        "left": left(database, store, owners),
    }  # fmt: skip


def everybody(session: Session) -> list[tuple[Person, str]]:
    """Returns all people, the oldest first, and what is known of each one's key."""
    keys = {key.id: key for key in session.scalars(select(Key))}
    people = session.scalars(select(Person).order_by(Person.created))
    return [(person, _key(keys.get(person.key))) for person in people]


def _key(key: Key | None) -> str:
    if key is None:
        return "no key"
    return f"{key.name} (revoked)" if key.revoked else key.name


def _delete_rows(session: Session, owners: list[str]) -> dict[str, int]:
    """Deletes all rows of people and jobs; returns how many of each table."""
    wanted = {
        "files": delete(File).where(File.owner.in_(owners)),
        "deliveries": delete(Delivery).where(Delivery.job.in_(owners)),
        "worn": delete(Worn).where(Worn.person.in_(owners) | Worn.job.in_(owners)),
        "jobs": delete(Job).where(Job.id.in_(owners)),
        "people": delete(Person).where(Person.id.in_(owners)),
    }
    removed: dict[str, Any] = {name: session.execute(statement) for name, statement in wanted.items()}
    return {name: result.rowcount for name, result in removed.items()}


def left(database: Database, store: Store, owners: list[str]) -> dict[str, int]:
    """Returns how many files and rows of people and jobs there are."""
    counted = {
        "files": File.owner.in_(owners), "deliveries": Delivery.job.in_(owners), "jobs": Job.id.in_(owners),
        "worn": Worn.person.in_(owners) | Worn.job.in_(owners), "people": Person.id.in_(owners),
    }  # fmt: skip
    with database.read() as session:
        rows = sum(session.scalar(select(func.count()).where(where)) or 0 for where in counted.values())
    folders = sum((store.files / owner).exists() for owner in owners)
    staged = sum(folder.name.partition("-")[0] in owners for folder in store.work.iterdir())
    return {"files": folders + staged, "rows": rows}


def expire(database: Database, store: Store, hours: float) -> int:
    """Deletes what ended hours ago: pictures, and people whose training failed. Returns how many jobs."""
    with database.write() as session:
        old = Job.state.in_(ENDED), Job.ended < time.time() - 3600 * hours
        unwanted = (Job.kind == "images") | (Job.state != "succeeded")
        found = session.execute(select(Job.id, Job.person).where(*old, unwanted)).all()
        owners = [owner for row in found for owner in row if owner is not None]
        _delete_rows(session, owners)
        store.sweep(session)
    return len(found)
