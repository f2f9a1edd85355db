"""What a worker meets while others delete and cancel, and while its own two threads are at it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from services import Running, face
from sqlalchemy.orm import Session

from hyperdreambooth.serve import queue, tasks
from hyperdreambooth.serve.delete import delete_person
from hyperdreambooth.serve.queue import Claim
from hyperdreambooth.serve.tasks import Task
from hyperdreambooth.serve.worker import cancel


def test_who_is_deleted_or_canceled_between_claim_and_work_takes_nobody_along(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted, canceled, stays = (running.person(face(seed)) for seed in (1, 2, 3))
    worker: Any = running.worker
    real = worker._tasks

    def meanwhile(claims: Sequence[Claim]) -> Any:
        delete_person(running.database, running.service.store, deleted["person"], "local")
        cancel(running.database, running.service.store, canceled["id"], "local")
        tasks = real(claims)
        assert (len(claims), [task.claim.id for task in tasks]) == (3, [stays["id"]])
        return tasks

    monkeypatch.setattr(worker, "_tasks", meanwhile)
    assert running.worker.work_once()
    assert running.job(stays["id"])["status"] == "succeeded"
    assert running.job(canceled["id"])["status"] == "canceled"
    assert not running.worker.work_once()


def test_who_is_deleted_while_files_are_written_takes_nobody_along(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted, stays = running.person(face(1)), running.person(face(2))
    module: Any = tasks
    real = module._saved

    def meanwhile(task: Task, *rest: Any) -> Any:
        made = real(task, *rest)
        if task.claim.id == deleted["id"]:
            delete_person(running.database, running.service.store, deleted["person"], "local")
        return made

    monkeypatch.setattr(tasks, "_saved", meanwhile)
    assert running.worker.work_once() and not running.worker.work_once()
    assert running.job(stays["id"])["status"] == "succeeded"
    store = running.service.store
    assert [folder.name for folder in store.files.iterdir()] == [stays["person"]]
    assert not list(store.work.iterdir())


def test_a_picture_of_somebody_who_was_just_deleted_ends_no_worker(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = running.person()
    running.work()
    asked = {"prompt": "a [V] face", "adapters": [{"person": done["person"]}], "background": True}
    assert running.client.post("/v1/images/generations", json=asked).status_code == 202
    worker: Any = running.worker
    real = worker._tasks

    def meanwhile(claims: Sequence[Claim]) -> Any:
        delete_person(running.database, running.service.store, done["person"], "local")
        return real(claims)

    monkeypatch.setattr(worker, "_tasks", meanwhile)
    assert running.worker.work_once() and not running.worker.work_once()
    assert not list(running.service.store.work.iterdir())


def test_a_sign_of_life_that_began_before_a_claim_does_not_stop_its_work(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.person()
    with running.database.write() as session:
        claims = queue.claim(session, "worker_test", 8, 60, 5)
    worker: Any = running.worker
    real = queue.renew

    def late(session: Session, known: Sequence[Claim], lease: float) -> set[str]:
        worker._claims = claims  # the thread that works has just claimed them
        return real(session, known, lease)

    monkeypatch.setattr(queue, "renew", late)
    with running.database.write() as session:
        worker._renew(session)
    worker._told = time.monotonic() + 60  # so that this does not renew anything itself
    assert worker.tell({"step": 1})
    with running.database.write() as session:
        queue.release(session, "worker_test")
        queue.claim(session, "another", 8, 60, 5)
    with running.database.write() as session:
        worker._renew(session)
    assert not worker.tell({"step": 2})  # now it is another worker's
