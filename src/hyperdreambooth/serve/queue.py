"""The queue: every accepted job ends exactly once, whoever is killed.

A worker *claims* jobs for the length of a lease, which it renews while it works. A job whose lease ran out is
claimed by the next worker. Each claim has a new number, the *fence*: only who holds the newest may report
anything. So a worker that was taken for dead, and is not, can neither end a job twice nor overwrite anything.
API keys take turns: first comes the oldest job of each, then the second of each, and so on.
Every function here is one step in a transaction that writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Subquery, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from hyperdreambooth.serve.tables import Delivery, File, Job, new_id

ENDED = ("succeeded", "failed", "canceled")
ALONE = 3  # from this attempt on a job is tried alone, so that it can take no other down
_LOOKED_AT = 200  # waiting jobs among which those of one batch are looked for


@dataclass(frozen=True)
class Claim:
    """A worker's right to a job, until its lease ends."""

    id: str
    fence: int
    key: str
    kind: str
    settings: str
    request: dict[str, Any]
    person: str | None

    @property
    def name(self) -> str:
        """The name of the folder in which its files are prepared."""
        return f"{self.id}-{self.fence}"


def waiting(session: Session, now: float) -> bool:
    """Returns whether there is a job to claim."""
    return session.scalar(select(Job.seq).where(_free(now)).limit(1)) is not None


def _free(now: float) -> Any:
    return or_(Job.state == "queued", and_(Job.state == "running", Job.lease < now))


def _places(jobs: Any) -> Subquery:
    """Returns `seq` and `place`, from 1, of some jobs: their keys take turns, each with its oldest first."""
    turn = func.row_number().over(partition_by=Job.key, order_by=Job.seq).label("turn")
    turns = select(Job.seq, turn).where(jobs).subquery()
    place = func.row_number().over(order_by=(turns.c.turn, turns.c.seq)).label("place")
    return select(turns.c.seq, place).subquery()


def claim(session: Session, worker: str, most: int, lease: float, attempts: int) -> list[Claim]:
    """Claims the job whose turn it is, and further ones with the same settings, in their order.

    A job that was tried too often ends as failed.
    """
    now = time.time()
    places = _places(_free(now))
    first = select(Job).join(places, places.c.seq == Job.seq).order_by(places.c.place).limit(_LOOKED_AT)
    found = session.scalars(first).all()
    for job in found:
        if job.attempts >= attempts:
            times = f"{job.attempts} times"
            _end(session, job, "failed", {}, f"the worker died {times} while it did this job; try it later")
    free = [job for job in found if job.state not in ENDED]
    claimed = [claim_one(job, worker, now + lease) for job in _together(free, most)]
    session.flush()
    return claimed


def _together(free: Sequence[Job], most: int) -> list[Job]:
    """Returns the first job and those that may share its batch."""
    if not free or free[0].attempts + 1 >= ALONE:
        return list(free[:1])
    first = free[0]
    same = [one for one in free if (one.kind, one.settings) == (first.kind, first.settings)]
    return [one for one in same if one.attempts + 1 < ALONE][:most]


def claim_one(job: Job, worker: str, until: float) -> Claim:
    """Gives a job to a worker."""
    job.state, job.worker, job.lease = "running", worker, until
    job.fence, job.attempts, job.started = job.fence + 1, job.attempts + 1, job.started or time.time()
    return Claim(job.id, job.fence, job.key, job.kind, job.settings, dict(job.request), job.person)


def _held(claim: Claim) -> Any:
    return and_(Job.id == claim.id, Job.fence == claim.fence, Job.state == "running")


def renew(session: Session, claims: Sequence[Claim], lease: float) -> set[str]:
    """Renews leases, and returns the ids of the jobs that are still the worker's."""
    ids = session.scalars(select(Job.id).where(or_(*map(_held, claims)))).all() if claims else []
    session.execute(update(Job).where(Job.id.in_(ids)).values(lease=time.time() + lease))
    return set(ids)


def report(session: Session, claims: Sequence[Claim], progress: dict[str, Any]) -> None:
    """Notes how far jobs are."""
    session.execute(update(Job).where(or_(*map(_held, claims))).values(progress=progress))


def held(session: Session, claim: Claim) -> Job | None:
    """Returns the job of a claim if it is still the worker's, else None."""
    return session.scalar(select(Job).where(_held(claim)))


def end(session: Session, job: Job, state: str, result: dict[str, Any], error: str = "") -> list[str]:
    """Ends a job; returns the hashes of photos that nobody needs any more."""
    return _end(session, job, state, result, error)


def _end(session: Session, job: Job, state: str, result: dict[str, Any], error: str) -> list[str]:
    job.state, job.result, job.error, job.ended, job.lease = state, result, error, time.time(), 0.0
    keep = bool(job.request.get("keep_photos"))
    job.request = {}  # prompts are kept no longer than they are needed
    photos = File.owner == job.person, File.kind == "photo"
    hashes = [] if keep or job.kind != "person" else list(session.scalars(select(File.hash).where(*photos)))
    if hashes:
        session.execute(delete(File).where(*photos))
    if job.webhook:
        body = json.dumps({"type": f"job.{state}", "data": shown(job)})
        message = {"job": job.id, "key": job.key, "url": job.webhook, "body": body}
        session.add(Delivery(id=new_id("msg"), attempts=0, due=time.time(), **message))
    return hashes


def release(session: Session, worker: str) -> None:
    """Gives back the jobs of a worker that is known to be dead."""
    mine = and_(Job.worker == worker, Job.state == "running")
    session.execute(update(Job).where(mine).values(lease=0.0))


def position(session: Session, job: Job) -> int:
    """Returns the place of a waiting job in the queue, from 1."""
    places = _places(Job.state == "queued")
    return session.scalar(select(places.c.place).where(places.c.seq == job.seq)) or 1


def shown(job: Job) -> dict[str, Any]:
    """Returns a job as callers see it."""
    return {
        "object": "job", "id": job.id, "kind": job.kind, "status": job.state, "created": job.created,
        "started": job.started, "ended": job.ended, "person": job.person, "progress": job.progress,
        "result": job.result or None, "error": job.error or None,
    }  # fmt: skip


def shown_in_queue(session: Session, job: Job) -> dict[str, Any]:
    """Returns a job as callers see it, with its place as long as it waits."""
    return shown(job) | ({"position": position(session, job)} if job.state == "queued" else {})
