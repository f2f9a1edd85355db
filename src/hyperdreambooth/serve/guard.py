"""What stands before every route: bounds on a request's size and time, figures, and no word too many.

An error that nobody expected is logged by its kind and place only, because its message may quote a caller.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any
from urllib.parse import unquote

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.log import logger, note_failure
from hyperdreambooth.serve.metrics import Metrics
from hyperdreambooth.serve.service import Refused

_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer"),
]  # fmt: skip
_HEALTH = ("/healthz", "/readyz", "/metrics")


class Guard:
    """An ASGI application around the service's own."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self._app, self._config, self._metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await _refuse(answer, *refusal)
            else:
                await self._app(scope, self._bounded(receive), answer)
        except ClientDisconnect:
            status = 499  # as nginx calls a client that went away
        except Exception as error:
            note_failure(error)
            if status == 0:
                await _refuse(answer, 500, "the service failed at this request; its log has the place")
        self._note(scope, status, time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Returns why a request is refused by its first lines alone."""
        query = unquote(scope["query_string"].decode("latin-1"))
        if not (scope["path"] + query).isprintable():
            return 400, "address: expected characters that can be printed"
        sizes = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(len(value) > 15 or int(value) > self._config.body_bytes for value in sizes if value.isdigit()):
            return 413, f"body: expected at most {self._config.body_bytes:,} bytes"
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """Returns a `receive` that ends a body which is too large or too slow."""
        got, ended, until = 0, False, time.monotonic() + self._config.patience

        async def bounded() -> Message:
            nonlocal got, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise Refused(408, f"body: expected within {self._config.patience:g} seconds") from None
            got += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if got > self._config.body_bytes:
                raise Refused(413, f"body: expected at most {self._config.body_bytes:,} bytes")
            return message

        return bounded

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE") else "other"
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route in _HEALTH else logging.INFO  # probes come every few seconds
        logger.log(level, "%s %s %s %.0f ms", method, route, status, 1000 * seconds)


async def _refuse(send: Send, status: int, text: str) -> None:
    body = json.dumps(problem(status, text)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def problem(status: int, text: str) -> dict[str, Any]:
    """Returns an error in the shape of OpenAI's."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": text, "type": kind, "code": status, "param": None}}
