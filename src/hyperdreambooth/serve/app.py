"""The application: routes, errors as sentences, health and figures."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from hyperdreambooth import __version__
from hyperdreambooth.files import InputError
from hyperdreambooth.serve import images, jobs, people
from hyperdreambooth.serve.auth import Caller
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.decode import Decoder
from hyperdreambooth.serve.guard import Guard, problem
from hyperdreambooth.serve.metrics import SILENT, Metrics
from hyperdreambooth.serve.people import sentence
from hyperdreambooth.serve.service import Needs, Service
from hyperdreambooth.serve.store import Store
from hyperdreambooth.serve.tables import Worker

_ABOUT = "One photo of a person to a LoRA, and pictures of that person. Every address begins with `/v1`."


def create_app(config: ServeConfig) -> FastAPI:
    """Makes the application on a database that is up to date; it starts no worker."""
    store, database = Store(config.data), Database(config.url)
    service = Service(config, database, store, Decoder(config), Metrics(database))

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncGenerator[None]:
        service.decoder.start()  # so that the first photo need not wait for it
        yield
        service.decoder.close()
        database.close()

    app = FastAPI(title="hyperdreambooth", version=__version__, description=_ABOUT, lifespan=life)
    app.state.service = service
    app.add_middleware(Guard, config=config, metrics=service.metrics)
    for part in (people, jobs, images):
        app.include_router(part.router)
    _add_errors(app)
    _add_health(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(
            problem(error.status_code, error.detail), error.status_code, headers=error.headers
        )

    async def mistaken(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(problem(422, sentence(error.errors())), 422)

    async def wrong(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(problem(422, str(error)), 422)

    async def busy(_: Request, error: Any) -> JSONResponse:
        del error
        return JSONResponse(
            problem(503, "the database is busy; try again"), 503, headers={"Retry-After": "2"}
        )

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, mistaken)
    app.add_exception_handler(InputError, wrong)
    app.add_exception_handler(OperationalError, busy)
    app.add_exception_handler(PoolTimeout, busy)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthy() -> dict[str, str]:  # no thread is needed, which many photos may have taken
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operation"])
    def ready(response: Response) -> dict[str, Any]:
        """Whether the database answers and a worker was heard of lately."""
        with service.database.read() as session:
            alive = select(func.count()).select_from(Worker).where(Worker.seen > time.time() - SILENT)
            workers = session.scalar(alive) or 0
        response.status_code = 200 if workers else 503
        return {"status": "ready" if workers else "no worker yet", "workers": workers}

    @app.get("/metrics", tags=["operation"], response_class=Response)
    def metrics(_: Annotated[Caller, Depends(Needs("metrics"))]) -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    del healthy, ready, metrics  # the application has them
