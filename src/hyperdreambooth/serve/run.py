"""`hdb serve`: the server, its workers, and what has to be done now and then."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from multiprocessing import connection, get_context
from typing import Any

import uvicorn
from sqlalchemy import select
from uvicorn.protocols.http.h11_impl import H11Protocol

from hyperdreambooth.files import InputError
from hyperdreambooth.serve.app import create_app
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.delete import expire
from hyperdreambooth.serve.log import note_failure
from hyperdreambooth.serve.marks import check_certificate
from hyperdreambooth.serve.store import Store
from hyperdreambooth.serve.tables import Key, new_id
from hyperdreambooth.serve.tasks import load_filter
from hyperdreambooth.serve.webhooks import deliver
from hyperdreambooth.serve.worker import retire, run_worker

_HEADER_BYTES = 16_384  # of a request's first line and headers
_PAUSES = (0.5, 30.0)  # seconds until a worker that died is started again: doubled each time


def serve(config: ServeConfig) -> None:
    """Serves until it is interrupted.

    Raises:
        InputError: a setting that cannot work, or an address for others without API keys.
        OSError: the port is taken.
    """
    check(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.create_server((config.host, config.port), family=family, backlog=256)
    settings: Any = dict(
        ws="none", log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=5, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=_HEADER_BYTES,
        limit_concurrency=config.connections, http=_patient(config.patience),
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has ended
    server = uvicorn.Server(uvicorn.Config(create_app(config), **settings))
    ended = threading.Event()
    threads = [threading.Thread(target=_supervise, args=(config, device, ended)) for device in config.devices]
    threads.append(threading.Thread(target=_keep_house, args=(config, ended)))
    for thread in threads:
        thread.start()
    logging.getLogger("hyperdreambooth").info("serving at http://%s:%d", *listening.getsockname()[:2])
    try:
        server.run(sockets=[listening])
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def check(config: ServeConfig) -> None:
    """Prepares the database, and refuses what would not work or would not be safe."""
    load_filter(config.content_filter)
    check_certificate(config)
    Store(config.data)
    database = Database(config.url)
    database.migrate()
    with database.read() as session:
        keyless = session.scalar(select(Key.id).limit(1)) is None
    database.close()
    if keyless and not config.on_loopback:
        raise InputError(
            f"host {config.host}: others can reach this address, and there are no API keys; make one first "
            "with hdb serve keys add NAME, or listen on 127.0.0.1"
        )


def _patient(seconds: float) -> type[H11Protocol]:
    """Returns uvicorn's protocol with an end for clients that connect and then send no whole request."""

    class Patient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self._leave)

        def _leave(self) -> None:
            waiting: Any = self.cycle  # None until a request is whole
            if waiting is None and not self.transport.is_closing():
                self.transport.close()

    return Patient


def _supervise(config: ServeConfig, device: str, ended: threading.Event) -> None:
    """Keeps a worker process running on a device; what it was doing when it died is given back."""
    database, pause = Database(config.url), _PAUSES[0]
    while not ended.is_set():
        name = new_id("worker")
        process = get_context("spawn").Process(target=run_worker, args=(config, device, name))
        process.start()
        died, waited = _wait(process.sentinel, ended)
        process.kill()
        process.join()
        try:
            retire(database, name)
        except Exception as error:  # leases end by themselves
            note_failure(error)
        if died:
            logging.getLogger("hyperdreambooth").warning("the worker on %s died; another one starts", device)
            pause = _PAUSES[0] if waited > _PAUSES[1] else min(2 * pause, _PAUSES[1])
            ended.wait(pause)
    database.close()


def _wait(sentinel: Any, ended: threading.Event) -> tuple[bool, float]:
    """Waits for a process's end, or the service's; returns whether it was the process's, and the seconds."""
    waited = 0.0
    while not ended.is_set():
        if connection.wait([sentinel], 0.2):
            return True, waited
        waited += 0.2
    return False, waited


def _keep_house(config: ServeConfig, ended: threading.Event) -> None:
    """Sends webhooks every second, and deletes what has expired every minute."""
    database, store, turn = Database(config.url), Store(config.data), 0
    while not ended.wait(1.0):
        turn += 1
        try:
            deliver(database, config)
            if turn % 60 == 1:
                expire(database, store, config.keep_hours)
        except Exception as error:  # the database may be away for a while
            note_failure(error)
    database.close()
