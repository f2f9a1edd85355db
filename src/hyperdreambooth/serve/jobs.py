"""`/v1/jobs`: what became of a request, step by step, and how to cancel it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from hyperdreambooth.serve.auth import Caller
from hyperdreambooth.serve.queue import ENDED, shown, shown_in_queue
from hyperdreambooth.serve.service import Needs, Refused, Service, ServiceOf
from hyperdreambooth.serve.tables import File, Job
from hyperdreambooth.serve.worker import cancel

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
Any_ = Annotated[Caller, Depends(Needs())]
_LOOK, _PING = 0.3, 15.0  # seconds between two looks, and until a silent stream shows that it lives


@router.get("")
def list_jobs(service: ServiceOf, who: Any_, after: int = 0) -> dict[str, Any]:
    """List the caller's jobs, oldest first, a hundred at a time; `after` is the `next` of the page before."""
    with service.database.read() as session:
        mine = select(Job).where(Job.key == who.id, Job.seq > max(0, min(after, 2**31 - 1)))
        jobs = session.scalars(mine.order_by(Job.seq).limit(100)).all()
        last = jobs[-1].seq if jobs else after
        return {"object": "list", "data": [shown(job) for job in jobs], "next": last}


@router.get("/{job}")
def show_job(job: str, service: ServiceOf, who: Any_) -> dict[str, Any]:
    """Show a job: queued with its position, running with its progress, or how it ended."""
    found = _find(service, job, who)
    if found is None:
        raise Refused(404, "no such job")
    return found


def _find(service: Service, job: str, who: Caller) -> dict[str, Any] | None:
    with service.database.read() as session:
        found = session.scalar(select(Job).where(Job.id == job, Job.key == who.id))
        if found is None:
            return None
        made = shown_in_queue(session, found)
        if found.kind == "images" and found.state == "succeeded":
            files = session.scalars(select(File.id).where(File.owner == job).order_by(File.number))
            made["result"] = {"data": [{"url": f"/v1/files/{file}"} for file in files]}
        return made


@router.delete("/{job}")
def cancel_job(job: str, service: ServiceOf, who: Any_) -> dict[str, Any]:
    """Cancel a job; one that has ended stays as it ended."""
    if cancel(service.database, service.store, job, who.id) is None:
        raise Refused(404, "no such job")
    return _find(service, job, who) or {}


@router.get("/{job}/events", response_class=StreamingResponse)
def follow_job(job: str, service: ServiceOf, who: Any_) -> StreamingResponse:
    """Follow a job by server-sent events: `job` whenever something changes, until it ends."""
    show_job(job, service, who)
    return StreamingResponse(_events(service, job, who), media_type="text/event-stream")


async def _events(service: Service, job: str, who: Caller) -> AsyncGenerator[str]:
    last, spoke = "", time.monotonic()
    while True:
        found = await run_in_threadpool(_find, service, job, who)
        if found is None:  # its person was deleted
            yield "event: deleted\ndata: {}\n\n"
            return
        if (now := json.dumps(found)) != last:
            last, spoke = now, time.monotonic()
            yield f"event: job\ndata: {now}\n\n"
        elif time.monotonic() - spoke > _PING:
            spoke = time.monotonic()
            yield ": still there\n\n"
        if found["status"] in ENDED:
            return
        await asyncio.sleep(_LOOK)
