"""What every route needs, and how a request says no."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hyperdreambooth.serve.auth import Caller, RateLimit, caller
from hyperdreambooth.serve.config import LOOPBACK, ServeConfig
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.decode import Decoder
from hyperdreambooth.serve.metrics import Metrics
from hyperdreambooth.serve.store import Store
from hyperdreambooth.serve.tables import Job, Person, new_id
from hyperdreambooth.serve.webhooks import target

_RECENT = 20  # ended jobs by which the time until one may come again is estimated
_bearer = HTTPBearer(auto_error=False, description="A key that `hdb serve keys add` printed.")


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    config: ServeConfig
    database: Database
    store: Store
    decoder: Decoder
    metrics: Metrics
    limit: RateLimit = field(default_factory=RateLimit)


class Refused(HTTPException):
    """A request that is not done: a status, and a sentence for the caller."""

    def __init__(self, status: int, sentence: str, wait: float = 0.0) -> None:
        super().__init__(status, sentence, {"Retry-After": str(int(wait) + 1)} if wait else None)


def service_of(request: Request) -> Service:
    """Returns the service that a request goes to."""
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(service_of)]


class Needs:
    """A dependency of routes: gives the caller, who needs a scope (any will do if it is empty)."""

    def __init__(self, scope: str = "") -> None:
        self._scope = scope

    def __call__(
        self,
        request: Request,
        service: ServiceOf,
        _token: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Caller:
        """Finds the caller, or refuses the request."""
        with service.database.read() as session:
            found = caller(session, request.headers.get("authorization", ""), service.config)
        if found is None:
            raise Refused(401, "the key is missing, unknown or revoked; send Authorization: Bearer hdb_…")
        if found.id == "local" and not from_this_machine(request.headers):
            raise Refused(403, "without API keys only programs on this machine are served; make a key")
        if self._scope and self._scope not in found.scopes:
            raise Refused(403, f"the key has no scope {self._scope!r}")
        if wait := service.limit.wait(found, time.monotonic()):
            raise Refused(429, f"more than {found.per_minute} requests a minute; wait a little", wait)
        return found


def from_this_machine(headers: Mapping[str, str]) -> bool:
    """Returns whether a request is no page's in a browser (its `Origin`, a rebound name) and no proxy's."""
    host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
    origin = headers.get("origin")
    same = origin is None or origin.partition("://")[2] == headers.get("host", "")
    return host.strip("[]") in LOOPBACK and same and not {"forwarded", "x-forwarded-for"} & {*headers}


@dataclass(frozen=True)
class Order:
    """A job that a caller asks for.

    Attributes:
        kind: `person` or `images`.
        settings: what the jobs of a batch have in common.
        request: the rest.
        webhook: the address that is told the job's end; empty for none.
        idempotency: the caller's key for this request, so that it may be sent again; None for none.
        about: what else the request consists of; a hash of it all tells apart two requests of one key.
    """

    kind: str
    settings: dict[str, Any]
    request: dict[str, Any]
    webhook: str
    idempotency: str | None
    about: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """A hash of the request."""
        text = json.dumps([self.kind, self.settings, self.request, self.webhook, self.about], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def idempotency(request: Request) -> str | None:
    """Returns the header `Idempotency-Key`.

    Raises:
        Refused: it is no such key.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,200}", key):
        raise Refused(422, "Idempotency-Key: expected up to 200 visible ASCII characters")
    return key


def earlier(session: Session, key: str, order: Order) -> Job | None:
    """Returns the job that the same request made when it came before.

    Raises:
        Refused: another request had the same idempotency key.
    """
    if order.idempotency is None:
        return None
    found = session.scalar(select(Job).where(Job.key == key, Job.idempotency == order.idempotency))
    if found is not None and found.asked != order.asked:
        raise Refused(422, "Idempotency-Key: another request had it; choose a new one")
    return found


def accept(session: Session, service: Service, who: Caller, order: Order, person: str | None) -> Job:
    """Puts a job at the end of the queue.

    Raises:
        Refused: the queue is full, or has as many jobs of the caller as a key may have in it.
    """
    waiting = select(func.count()).select_from(Job).where(Job.state == "queued")
    held, own = session.scalar(waiting) or 0, session.scalar(waiting.where(Job.key == who.id)) or 0
    if held >= service.config.most_waiting:
        raise Refused(429, f"{held} jobs are waiting; try again later", _pace(session))
    if own >= who.waiting:
        raise Refused(429, f"{own} jobs of this key are waiting; try again later", _pace(session))
    job = Job(
        id=new_id("job"), key=who.id, kind=order.kind, state="queued", person=person, request=order.request,
        settings=json.dumps(order.settings, sort_keys=True), progress={}, result={}, error="",
        webhook=order.webhook, idempotency=order.idempotency, asked=order.asked, created=time.time(),
        started=None, ended=None, worker="", lease=0.0, fence=0, attempts=0,
    )  # fmt: skip
    session.add(job)
    session.flush()
    return job


def _pace(session: Session) -> float:
    """Returns the seconds in which a place in the queue becomes free, from the newest jobs that ended."""
    newest = select(Job.ended).where(Job.ended.is_not(None)).order_by(Job.ended.desc()).limit(_RECENT)
    ends = [end for end in session.scalars(newest) if end is not None]
    return min(300.0, max(1.0, (time.time() - ends[-1]) / len(ends))) if ends else 10.0


def check_people(session: Session, who: Caller) -> None:
    """Refuses a person too many.

    Raises:
        Refused: the caller has all the people that the key allows.
    """
    kept = session.scalar(select(func.count()).select_from(Person).where(Person.key == who.id)) or 0
    if kept >= who.people:
        raise Refused(403, f"the key may keep {who.people} people; delete one first")


def check_steps(steps: int | None, config: ServeConfig) -> None:
    """Refuses more steps than the operator allows.

    Raises:
        Refused: more than `most_steps`.
    """
    if steps is not None and steps > config.most_steps:
        raise Refused(422, f"steps: expected at most {config.most_steps}, got {steps}")


def check_webhook(url: str, config: ServeConfig) -> None:
    """Refuses an address that would never be called (an `InputError`)."""
    if url:
        target(url, config.webhook_hosts)
