"""The queue's promises, as transactions: order, batches, leases, fences, and one end for each job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import BOTH
from sqlalchemy import func, select

from hyperdreambooth.serve import queue
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.tables import Delivery, Job, Table, new_id


@pytest.fixture
def database(tmp_path: Path, database_url: str) -> Iterator[Database]:
    made = Database(database_url or f"sqlite:///{tmp_path / 'x.db'}")
    made.migrate()
    yield made
    made.close()


def add(database: Database, count: int = 1, **fields: Any) -> list[str]:
    """Adds waiting jobs, and returns their ids."""
    usual: dict[str, Any] = {
        "key": "k", "kind": "images", "state": "queued", "settings": "{}", "request": {"prompt": "secret"},
        "person": None, "progress": {}, "result": {}, "error": "", "webhook": "", "idempotency": None,
        "asked": "", "created": time.time(), "started": None, "ended": None, "worker": "", "lease": 0.0,
        "fence": 0, "attempts": 0,
    }  # fmt: skip
    ids = [new_id("job") for _ in range(count)]
    with database.write() as session:
        for one in ids:
            session.add(Job(id=one, **{**usual, **fields}))
            session.flush()
    return ids


def claim(database: Database, most: int = 8, lease: float = 60, attempts: int = 9) -> list[queue.Claim]:
    with database.write() as session:
        return queue.claim(session, "w", most, lease, attempts)


def job(database: Database, name: str) -> Job:
    with database.read() as session:
        return session.scalars(select(Job).where(Job.id == name)).one()


@BOTH
def test_the_oldest_comes_first_and_takes_along_what_has_its_settings(database: Database) -> None:
    first, *same = add(database, 3)
    (other,) = add(database, settings='{"steps": 2}')
    (late,) = add(database)
    assert [one.id for one in claim(database)] == [first, *same, late]
    assert [one.id for one in claim(database)] == [other]
    assert claim(database) == []


@BOTH
def test_keys_take_turns_and_the_jobs_of_a_key_keep_their_order(database: Database) -> None:
    many, few = add(database, 5, key="many"), add(database, 2, key="few")
    wanted = [many[0], few[0], many[1], few[1], *many[2:]]
    with database.read() as session:
        places = {one.id: queue.position(session, one) for one in session.scalars(select(Job))}
    assert sorted(places, key=places.__getitem__) == wanted and sorted(places.values()) == [*range(1, 8)]
    assert [one.id for one in claim(database, 3)] == wanted[:3]
    (late,) = add(database, key="late")
    assert [one.id for one in claim(database, 3)] == [many[2], few[1], late]
    assert [one.id for one in claim(database)] == many[3:]


@BOTH
def test_a_batch_is_no_larger_than_asked(database: Database) -> None:
    names = add(database, 5)
    assert [[one.id for one in claim(database, 2)] for _ in range(3)] == [names[:2], names[2:4], names[4:]]


@BOTH
def test_a_job_of_a_silent_worker_is_claimed_again_and_the_first_one_may_report_nothing(
    database: Database,
) -> None:
    add(database, webhook="https://example.org")
    (old,) = claim(database, lease=-1)
    (new,) = claim(database)
    assert (new.id, new.fence) == (old.id, old.fence + 1)
    with database.write() as session:
        assert queue.renew(session, [old], 60) == set() and queue.held(session, old) is None
        queue.report(session, [old], {"step": 99})
    assert job(database, new.id).progress == {}
    with database.write() as session:
        mine = queue.held(session, new)
        assert mine is not None
        queue.end(session, mine, "succeeded", {"likeness": 1})
    with database.write() as session:
        assert queue.held(session, new) is None  # nobody ends it a second time
        assert session.scalar(select(func.count()).select_from(Delivery)) == 1
    assert job(database, new.id).request == {}  # the prompt is gone


@BOTH
def test_a_renewed_lease_keeps_others_away(database: Database) -> None:
    add(database)
    held = claim(database, lease=-1)
    with database.write() as session:
        assert queue.renew(session, held, 60) == {held[0].id}
    assert claim(database) == []
    with database.write() as session:
        queue.release(session, "w")
    assert [one.id for one in claim(database)] == [held[0].id]


@BOTH
def test_a_job_whose_worker_dies_is_tried_alone_and_then_fails(database: Database) -> None:
    deadly, *others = add(database, 3)
    for _ in range(queue.ALONE - 1):
        assert len(claim(database, lease=-1)) == 3
    assert [one.id for one in claim(database, lease=-1)] == [deadly]
    assert claim(database, attempts=queue.ALONE)[0].id == others[0]  # the first was tried too often
    failed = job(database, deadly)
    assert failed.state == "failed" and "the worker died 3 times" in failed.error


@BOTH
def test_the_tables_are_those_of_the_migrations(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.write() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, Table.metadata) == []
    database.migrate()  # a second time changes nothing
