"""`/v1/images/generations`: OpenAI's images API, with `adapters` for the people on the pictures."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import select
from sqlalchemy.orm import Session

from hyperdreambooth.base.load import PLACEHOLDER
from hyperdreambooth.serve.auth import Caller
from hyperdreambooth.serve.queue import ENDED, shown, shown_in_queue
from hyperdreambooth.serve.requests import Drawing
from hyperdreambooth.serve.service import (
    Needs,
    Order,
    Refused,
    Service,
    ServiceOf,
    accept,
    check_steps,
    check_webhook,
    earlier,
    idempotency,
)
from hyperdreambooth.serve.tables import File, Job, Person, Worn

router = APIRouter(prefix="/v1", tags=["images"])
May = Annotated[Caller, Depends(Needs("images"))]
_LOOK = 0.2  # seconds between two looks at a job that a request waits for


@router.post("/images/generations")
async def draw(
    request: Request, response: Response, drawing: Drawing, service: ServiceOf, who: May
) -> dict[str, Any]:
    """Draw pictures. Answers when they are there, or with 202 and a job (`background`, or a long queue)."""
    order = _order(drawing, idempotency(request), service)
    job = await run_in_threadpool(_accept, service, who, order, drawing)
    until = time.monotonic() + (0 if drawing.background else service.config.wait)
    while job["status"] not in ENDED and time.monotonic() < until:
        if await request.is_disconnected():  # nobody listens; the job goes on and can be asked for
            break
        await asyncio.sleep(_LOOK)
        job = await run_in_threadpool(_look, service, job["id"])
    if job["status"] not in ENDED:
        response.status_code = 202
        response.headers["Location"] = f"/v1/jobs/{job['id']}"
        return job
    if job["status"] != "succeeded":
        raise Refused(422 if job["status"] == "failed" else 409, job["error"] or "the job was canceled")
    return await run_in_threadpool(_answer, service, job, drawing.response_format)


def _order(drawing: Drawing, key: str | None, service: Service) -> Order:
    config = service.config
    check_steps(drawing.steps, config)
    if drawing.n > config.most_pictures:
        raise Refused(422, f"n: expected at most {config.most_pictures}, got {drawing.n}")
    if drawing.adapters and PLACEHOLDER not in drawing.prompt:
        raise Refused(422, f"prompt: expected {PLACEHOLDER} where the person is meant")
    check_webhook(drawing.webhook, config)
    settings: dict[str, Any] = {"steps": drawing.steps, "guidance": drawing.guidance}
    settings |= {"size": _side(drawing.size, config.most_pixels)} if drawing.size != "auto" else {}
    settings |= {"negative": drawing.negative_prompt} if drawing.negative_prompt else {}
    request = drawing.model_dump(include={"prompt", "n", "seed", "adapters"}) | {
        "form": drawing.output_format
    }
    return Order("images", settings, request, drawing.webhook, key)


def _side(size: str, most: int) -> int:
    width, _, height = size.partition("x")
    if width != height or int(width) ** 2 > most:
        raise Refused(422, f"size: expected a square of at most {most:,} pixels, or auto")
    return int(width)


def _accept(service: Service, who: Caller, order: Order, drawing: Drawing) -> dict[str, Any]:
    with service.database.write() as session:
        job = earlier(session, who.id, order)
        if job is None:
            people = {one.person for one in drawing.adapters}
            for person in people:
                _check_ready(session, who, person)
            job = accept(session, service, who, order, None)
            if not people:  # two such jobs may ask for the very same picture, which a batch draws differently
                job.settings = job.settings.replace("{", '{"job": "' + job.id + '", ', 1)
            session.add_all(Worn(job=job.id, person=person) for person in people)
        return shown_in_queue(session, job)


def _check_ready(session: Session, who: Caller, person: str) -> None:
    mine = select(File.id).join(Person, Person.id == File.owner).where(Person.key == who.id)
    if session.scalar(mine.where(Person.id == person, File.kind == "diffusers")) is None:
        raise Refused(404, "adapters: no such person, or the person is not ready")


def _look(service: Service, job: str) -> dict[str, Any]:
    with service.database.read() as session:
        found = session.scalar(select(Job).where(Job.id == job))
        if found is None:
            raise Refused(410, "a person of this picture was deleted")
        return shown(found)


def _answer(service: Service, job: dict[str, Any], form: str) -> dict[str, Any]:
    with service.database.read() as session:
        files = session.scalars(select(File).where(File.owner == job["id"]).order_by(File.number)).all()
        if form == "url":
            data = [{"url": f"/v1/files/{file.id}"} for file in files]
        else:
            data = [{"b64_json": base64.b64encode(service.store.read(file)).decode()} for file in files]
    return {"created": int(job["created"]), "job": job["id"], "data": data}


@router.get("/files/{file}", response_class=Response)
def download_picture(file: str, service: ServiceOf, who: Annotated[Caller, Depends(Needs())]) -> Response:
    """Download a picture."""
    with service.database.read() as session:
        mine = select(File).join(Job, Job.id == File.owner).where(Job.key == who.id)
        found = session.scalar(mine.where(File.id == file))
        if found is None:
            raise Refused(404, "no such picture")
        return Response(service.store.read(found), media_type=found.media)
