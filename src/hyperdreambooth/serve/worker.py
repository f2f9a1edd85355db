"""A worker process: one warm device, which claims jobs, does them side by side and publishes the results."""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import parent_process
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from tqdm import tqdm

from hyperdreambooth.files import discard
from hyperdreambooth.serve import queue
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.log import note_failure
from hyperdreambooth.serve.queue import Claim
from hyperdreambooth.serve.store import Store
from hyperdreambooth.serve.tables import File, Job, Worker, Worn
from hyperdreambooth.serve.tasks import WRITERS, Outcome, Studio, Task, opened
from hyperdreambooth.workers import begin

_IDLE = 0.1  # seconds between two looks at an empty queue
_BEAT = 5.0  # seconds between two signs of life, at most
_TOLD = 0.5  # seconds between two notes of progress


def run_worker(config: ServeConfig, device: str, name: str) -> None:
    """Works until the process that started it ends, or for ever where it was started by itself."""
    if parent_process() is not None:
        begin()
    logging.getLogger("hyperdreambooth").setLevel(logging.CRITICAL)  # no progress bars
    logging.disable(logging.ERROR)  # libraries quote prompts in what they log
    warnings.simplefilter("ignore")  # and so do warnings
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed worker would leave behind
    One(config, Studio(config, device), device, name).run()


class One:
    """One worker."""

    def __init__(self, config: ServeConfig, studio: Studio, device: str, name: str) -> None:
        self._config, self.studio, self._device, self._name = config, studio, device, name
        self._database, self._store = Database(config.url), Store(config.data)
        self._claims: Sequence[Claim] = ()
        self._lost: set[str] = set()  # names of claims that are nobody's or somebody else's by now
        self._told = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        """Works for ever, and shows signs of life from a thread."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._ended.set())
        self.sign_in()
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            while not self._ended.is_set():
                if not self.work_once():
                    self._ended.wait(_IDLE)
        finally:
            retire(self._database, self._name)

    def close(self) -> None:
        """Has the worker end after its batch, and closes its connections."""
        self._ended.set()
        self._database.close()

    def work_once(self) -> bool:
        """Does one batch; returns whether there was any."""
        with self._database.read() as session:
            if not queue.waiting(session, time.time()):
                return False
        with self._database.write() as session:
            claims = queue.claim(
                session, self._name, self.studio.together, self._config.lease, self._config.attempts
            )
        if claims:
            self._claims = claims
            self._do(claims)
            self._claims = ()
            self._lost.clear()
        return bool(claims)

    def _do(self, claims: Sequence[Claim]) -> None:
        tasks = self._tasks(claims)
        if not tasks:
            return
        try:
            self._publish(tasks, self.studio.do(tasks, self.tell))
        finally:
            for claim in claims:
                discard(self._store.work / claim.name)

    def _tasks(self, claims: Sequence[Claim]) -> list[Task]:
        """Reads what jobs need; leaves out a job that lost its person or its photos since it was claimed."""
        found = list[Task]()
        with self._database.read() as session:
            for claim in claims:
                with suppress(KeyError, FileNotFoundError):
                    task = self._task(session, claim)
                    found += [task] if task.photos or claim.kind != "person" else []
        return found

    def _task(self, session: Session, claim: Claim) -> Task:
        """Reads what a job needs: the photos of its person, or the adapters of whom it draws."""
        folder = self._store.work / claim.name
        if claim.kind == "person":
            kept = select(File).where(File.owner == claim.person, File.kind == "photo").order_by(File.number)
            photos = [opened(self._store.read(one)) for one in session.scalars(kept)]
            return Task(claim, folder, photos)
        worn = select(File).join(Worn, Worn.person == File.owner).where(Worn.job == claim.id)
        files = {
            one.owner: self._store.path(one) for one in session.scalars(worn.where(File.kind == "diffusers"))
        }
        asked = claim.request["adapters"]
        return Task(claim, folder, people=[(files[one["person"]], one["weight"]) for one in asked])

    def tell(self, progress: dict[str, Any]) -> bool:
        """Notes progress now and then; returns whether any job is still wanted."""
        if time.monotonic() - self._told > _TOLD:
            self._told = time.monotonic()
            with suppress(DBAPIError), self._database.write() as session:  # it may come back
                queue.report(session, self._claims, progress)
                self._renew(session)
        return any(claim.name not in self._lost for claim in self._claims)

    def _renew(self, session: Session) -> None:
        """Renews leases. The thread of the signs of life may meet here with the one that works."""
        claims = self._claims
        held = queue.renew(session, claims, self._config.lease)
        self._lost.update(claim.name for claim in claims if claim.id not in held)

    def _publish(self, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> None:
        """Ends jobs, with their files, in one transaction; what is not ours any more stays as it is."""
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(self._stage, tasks, outcomes))
        unwanted = list[tuple[str, list[str]]]()
        with self._database.write() as session:
            for task, outcome in zip(tasks, outcomes, strict=True):
                if (job := queue.held(session, task.claim)) is not None:
                    owner = job.person or job.id
                    if outcome.made:
                        self._store.publish(session, owner, outcome.made, task.claim.name)
                    state = "failed" if outcome.error else "succeeded"
                    unwanted.append((owner, queue.end(session, job, state, outcome.result, outcome.error)))
        for owner, photos in unwanted:
            self._store.remove(owner, photos)

    def _stage(self, task: Task, outcome: Outcome) -> None:
        """Writes what is not written yet; a job that was just deleted has no folder any more."""
        with suppress(FileNotFoundError):
            self._store.stage(task.claim.name, outcome.made)

    def sign_in(self) -> None:
        """Makes the worker known, and removes what others left behind."""
        with self._database.write() as session:
            session.merge(Worker(
                id=self._name, device=self._device, base=self.studio.me.base.source, seen=time.time(),
            ))  # fmt: skip
            self._store.sweep(session)

    def _beat(self) -> None:
        """Renews leases, and says that the worker lives."""
        while not self._ended.wait(min(_BEAT, self._config.lease / 3)):
            try:
                with self._database.write() as session:
                    if (me := session.get(Worker, self._name)) is not None:
                        me.seen = time.time()
                    self._renew(session)
            except Exception as error:  # the next beat may find the database again
                note_failure(error)


def retire(database: Database, name: str) -> None:
    """Signs off a worker that is known to be dead, and gives back its jobs."""
    with database.write() as session:
        queue.release(session, name)
        if (found := session.get(Worker, name)) is not None:
            session.delete(found)


def cancel(database: Database, store: Store, job: str, key: str) -> bool | None:
    """Cancels a job; returns whether it had not ended yet, or None for a job of nobody or somebody else."""
    with database.write() as session:
        found = session.scalar(select(Job).where(Job.id == job, Job.key == key))
        if found is None:
            return None
        if found.state in queue.ENDED:
            return False
        person, photos = found.person, queue.end(session, found, "canceled", {})
    if person is not None:
        store.remove(person, photos)
    return True
