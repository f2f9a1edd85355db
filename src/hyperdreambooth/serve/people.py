"""`/v1/people`: photos in, a job that makes the person, LoRA files out, and everything deleted on request."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from sqlalchemy import select
from starlette.formparsers import MultiPartException, MultiPartParser

from hyperdreambooth.adapter import FILES
from hyperdreambooth.files import discard
from hyperdreambooth.serve.auth import Caller
from hyperdreambooth.serve.delete import delete_person
from hyperdreambooth.serve.queue import shown_in_queue
from hyperdreambooth.serve.requests import NewPerson
from hyperdreambooth.serve.service import (
    Needs,
    Order,
    Refused,
    Service,
    ServiceOf,
    accept,
    check_people,
    check_steps,
    check_webhook,
    earlier,
    idempotency,
)
from hyperdreambooth.serve.store import Made
from hyperdreambooth.serve.tables import File, Job, Person, new_id

router = APIRouter(prefix="/v1/people", tags=["people"])
May = Annotated[Caller, Depends(Needs("people"))]
Any_ = Annotated[Caller, Depends(Needs())]

_FIELDS = NewPerson.model_json_schema()["properties"]
_PHOTOS = {"type": "array", "items": {"type": "string"}}
_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {
    "multipart/form-data": {"schema": {"type": "object", "required": ["photos", "consent"], "properties": {
        **_FIELDS, "photos": {"type": "array", "items": {"type": "string", "format": "binary"}},
    }}},
    "application/json": {"schema": {"type": "object", "required": ["photos", "consent"], "properties": {
        **_FIELDS, "photos": {**_PHOTOS, "description": "data:image/…;base64,…"},
    }}},
}}}  # fmt: skip


@router.post("", status_code=202, openapi_extra=_BODY)
async def make_person(request: Request, response: Response, service: ServiceOf, who: May) -> dict[str, Any]:
    """Make a person from photos: the answer is a job. With an `Idempotency-Key` it can be sent again."""
    fields, photos = await _read(request, service)
    if not 1 <= len(photos) <= service.config.photos:
        raise Refused(422, f"photos: expected 1 to {service.config.photos}, got {len(photos)}")
    order = _order(fields, photos, idempotency(request), service)
    job = await run_in_threadpool(_accept, service, who, order, fields, photos)
    response.headers["Location"] = f"/v1/jobs/{job['id']}"
    return job


async def _read(request: Request, service: Service) -> tuple[NewPerson, list[bytes]]:
    """Reads either kind of body. Nothing touches the disk: the body is bounded, and stays in memory."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        given, photos = await _multipart(request, service)
    elif kind == "application/json":
        given, photos = _json(await request.body())
    else:
        raise Refused(415, "content-type: expected multipart/form-data or application/json")
    try:
        return NewPerson.model_validate(given), photos
    except ValidationError as error:
        raise Refused(422, sentence(error.errors())) from None


async def _multipart(request: Request, service: Service) -> tuple[dict[str, Any], list[bytes]]:
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=service.config.photos + 1, max_fields=20,
        max_part_size=10_000,
    )  # fmt: skip
    parser.spool_max_size = service.config.body_bytes  # never a temporary file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"multipart: {error.message}") from None
    try:
        given, photos = dict[str, Any](), list[bytes]()
        for name, value in form.multi_items():
            if isinstance(value, str):
                given[name] = value
            elif name in ("photos", "photos[]", "photo"):
                photos.append(await value.read())
            else:
                raise Refused(422, "multipart: expected files in the field photos")
        return given, photos
    finally:  # the form itself does not know the file of a part that never ended
        for file in parser._files_to_close_on_error:  # pyright: ignore[reportPrivateUsage]
            file.close()


def _json(body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "body: expected JSON") from None
    photos = given.pop("photos", []) if isinstance(given, dict) else None
    if not isinstance(photos, list) or not all(isinstance(one, str) for one in photos):
        raise Refused(422, "photos: expected a list of data URIs")
    return given, [_data_uri(one) for one in photos]


def _data_uri(text: str) -> bytes:
    """Decodes a data URI; any other URI is refused, because nothing is fetched for a caller."""
    head, comma, content = text.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma and len(head) < 100):
        raise Refused(422, "photos: expected data URIs (data:image/jpeg;base64,…); no address is opened")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(422, "photos: a data URI is not base64") from None


def _order(fields: NewPerson, photos: Sequence[bytes], key: str | None, service: Service) -> Order:
    check_steps(fields.steps, service.config)
    check_webhook(fields.webhook, service.config)
    settings = fields.model_dump(include={"steps", "rank", "seed"}, exclude_none=True)
    request = fields.model_dump(include={"consent", "keep_photos"})
    hashes = tuple(hashlib.sha256(photo).hexdigest() for photo in photos)
    return Order("person", settings, request, fields.webhook, key, hashes)


def _accept(
    service: Service, who: Caller, order: Order, fields: NewPerson, photos: Sequence[bytes]
) -> dict[str, Any]:
    """Decodes and writes the photos, and makes the person and the job in one transaction."""
    with service.database.read() as session:
        if (before := earlier(session, who.id, order)) is not None:
            return shown_in_queue(session, before)
    clean = [Made("photo", service.decoder.decode(photo), "image/png") for photo in photos]
    person, store = new_id("person"), service.store
    try:
        store.stage(person, clean)  # before the transaction, in which everybody else would wait for the disk
        with service.database.write() as session:
            if (before := earlier(session, who.id, order)) is not None:  # the same request, at this moment
                return shown_in_queue(session, before)
            check_people(session, who)
            job = accept(session, service, who, order, person)
            kept = {"consent": fields.consent, "keep_photos": fields.keep_photos}
            session.add(Person(id=person, key=who.id, created=time.time(), **kept))
            store.publish(session, person, clean, person)
            return shown_in_queue(session, job)
    finally:
        discard(store.work / person)


@router.get("")
def list_people(service: ServiceOf, who: Any_, after: str = "") -> dict[str, Any]:
    """List the caller's people, a hundred at a time; `after` is the last id of the page before."""
    with service.database.read() as session:
        mine = select(Person, Job).join(Job, Job.person == Person.id).where(Person.key == who.id)
        rows = session.execute(mine.where(Person.id > after).order_by(Person.id).limit(100)).all()
        return {"object": "list", "data": [_shown(person, job) for person, job in rows]}


@router.get("/{person}")
def show_person(person: str, service: ServiceOf, who: Any_) -> dict[str, Any]:
    """Show a person."""
    with service.database.read() as session:
        found = session.execute(
            select(Person, Job).join(Job, Job.person == Person.id)
            .where(Person.id == person, Person.key == who.id)
        ).first()  # fmt: skip
        if found is None:
            raise Refused(404, "no such person")
        return _shown(*found)


def _shown(person: Person, job: Job) -> dict[str, Any]:
    return {
        "object": "person", "id": person.id, "status": job.state, "consent": person.consent, "job": job.id,
        "keep_photos": person.keep_photos, "created": person.created, **job.result,
    }  # fmt: skip


@router.get("/{person}/lora", response_class=Response)
def download_lora(
    person: str, service: ServiceOf, who: Any_, format: Literal["kohya", "diffusers", "lidb"] = "kohya"
) -> Response:
    """Download the person's LoRA: for ComfyUI, A1111 and Forge, for diffusers, or the prediction."""
    return _download(service, who, person, format, FILES[format])


@router.get("/{person}/card", response_class=Response)
def download_card(person: str, service: ServiceOf, who: Any_) -> Response:
    """Download the model card, in Markdown."""
    return _download(service, who, person, "card", "README.md")


def _download(service: Service, who: Caller, person: str, kind: str, name: str) -> Response:
    with service.database.read() as session:
        mine = select(File).join(Person, Person.id == File.owner).where(Person.key == who.id)
        file = session.scalar(mine.where(Person.id == person, File.kind == kind))
        if file is None:
            raise Refused(404, "no such person, or the person is not ready")
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "ETag": f'"{file.hash}"'}
        return Response(service.store.read(file), media_type=file.media, headers=headers)


@router.delete("/{person}")
def remove_person(person: str, service: ServiceOf, who: May) -> dict[str, Any]:
    """Delete everything of a person, and say what it was."""
    removed = delete_person(service.database, service.store, person, who.id)
    if removed is None:
        raise Refused(404, "no such person")
    return removed


def sentence(errors: Sequence[Any]) -> str:
    """Returns what is wrong with a request, without what was sent."""
    parts = [
        f"{'.'.join(str(one) for one in error['loc'] if one != 'body')}: {error['msg']}"
        for error in errors[:5]
    ]
    return "; ".join(parts)
