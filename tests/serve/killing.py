"""Kills server, worker and both with -9 at random moments while jobs come in; counts what became of them.

One interpreter imports everything and forks the processes, so that a new one takes a second. Prints JSON:
how many were killed, and every broken promise.

    python tests/serve/killing.py --kills 100 --jobs 200                     # SQLite in a temporary folder
    python tests/serve/killing.py --database postgresql+psycopg://…
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import multiprocessing
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import select

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

FORK: Any = multiprocessing.get_context("fork") if sys.platform != "win32" else None
GIVEN_UP = 600.0  # seconds in which all that was accepted has to end after the last kill


class Trial:
    """The processes, what was accepted, and what is promised."""

    def __init__(self, config: Any, rng: random.Random) -> None:
        self.config, self.rng = config, rng
        self.accepted: dict[str, str] = {}
        self.kills: Counter[str] = Counter()
        self.name = ""
        self.server = self.start("server")
        self.worker = self.start("worker")

    def start(self, kind: str) -> BaseProcess:
        """Forks a server or a worker."""
        from hyperdreambooth.serve.tables import new_id
        from hyperdreambooth.serve.worker import run_worker

        self.name = new_id("worker") if kind == "worker" else self.name
        words = (self.config,) if kind == "server" else (self.config, "cpu", self.name)
        process = FORK.Process(target=_serve if kind == "server" else run_worker, args=words)
        process.start()
        return process

    def kill(self) -> None:
        """Kills one of the processes, or both, and starts them again."""
        kind = self.rng.choice(["server", "worker", "both"])
        self.kills[kind] += 1
        victims = ["server", "worker"] if kind == "both" else [kind]
        for name in victims:
            getattr(self, name).kill()
        for name in victims:
            getattr(self, name).join()
            setattr(self, name, self.start(name))

    def end(self) -> None:
        """Ends both processes."""
        for process in (self.server, self.worker):
            process.kill()
            process.join()

    def ask(self, number: int) -> bool:
        """Sends a job, as often as needed for an answer; returns whether this time there was one."""
        from services import face

        key = f"order-{number}"
        content = face(number, 32)
        body = b"".join([
            b'--xx\r\nContent-Disposition: form-data; name="consent"\r\n\r\nsynthetic\r\n',
            b'--xx\r\nContent-Disposition: form-data; name="webhook"\r\n\r\nhttp://nobody.invalid/\r\n',
            b'--xx\r\nContent-Disposition: form-data; name="photos"; filename="a.png"\r\n\r\n', content,
            b"\r\n--xx--\r\n",
        ])  # fmt: skip
        headers = {"Content-Type": "multipart/form-data; boundary=xx", "Idempotency-Key": key}
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self.config.port, timeout=20)) as link:
                link.request("POST", "/v1/people", body, headers)
                answer = link.getresponse()
                text = answer.read()
        except (OSError, http.client.HTTPException):
            return False
        if answer.status == 202:
            self.accepted[key] = json.loads(text)["id"]
        elif answer.status < 503 and answer.status != 429:
            raise SystemExit(f"status {answer.status}: {text[:300]!r}")
        return answer.status == 202


def check(trial: Trial) -> list[str]:
    """Returns every promise that was broken."""
    from hyperdreambooth.serve.database import Database
    from hyperdreambooth.serve.store import Store
    from hyperdreambooth.serve.tables import Delivery, File, Job

    database, store, broken = Database(trial.config.url), Store(trial.config.data), list[str]()
    with database.write() as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
        ends = Counter(session.scalars(select(Delivery.job)))
        files = list(session.scalars(select(File)))
        store.sweep(session)
    for key, job in trial.accepted.items():
        state = jobs[job].state if job in jobs else "lost"
        if (state, ends[job]) != ("succeeded", 1):
            broken.append(f"{key}: {state}, ended {ends[job]} times")
    keys = Counter(job.idempotency for job in jobs.values())
    broken += [f"{key}: {count} jobs" for key, count in keys.items() if count != 1]
    kinds = Counter((file.owner, file.kind) for file in files)
    for job in jobs.values():
        if {kind for owner, kind in kinds if owner == job.person} != {"lidb", "kohya", "diffusers", "card"}:
            broken.append(f"{job.idempotency}: other files than a person has")
    broken += [f"{pair}: {count} files" for pair, count in kinds.items() if count != 1]
    for file in files:
        if hashlib.sha256(store.read(file)).hexdigest() != file.hash:
            broken.append(f"{file.kind}: another content")
    there = [path for folder in (store.files, store.work) for path in folder.rglob("*") if path.is_file()]
    if len(there) != len(files):
        broken.append(f"{len(there)} files on the disk, {len(files)} in the tables")
    order = [job.started or 0.0 for job in sorted(jobs.values(), key=lambda job: job.seq)]
    if order != sorted(order):
        broken.append("jobs were not begun in the order of their acceptance")
    database.close()
    return broken


def at_work(trial: Trial) -> bool:
    """Returns whether the newest worker has begun."""
    from hyperdreambooth.serve.database import Database
    from hyperdreambooth.serve.tables import Worker

    database = Database(trial.config.url)
    with database.read() as session:
        there = session.get(Worker, trial.name) is not None
    database.close()
    return there


def running(trial: Trial) -> int:
    """Returns how many jobs have not ended."""
    from hyperdreambooth.serve.database import Database
    from hyperdreambooth.serve.queue import ENDED
    from hyperdreambooth.serve.tables import Job

    database = Database(trial.config.url)
    with database.read() as session:
        left = len(session.scalars(select(Job.id).where(Job.state.not_in(ENDED))).all())
    database.close()
    return left


def main() -> None:
    """Runs the trial."""
    from hyperdreambooth.serve.config import ServeConfig
    from hyperdreambooth.serve.run import check as prepare

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--database", default="")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home, rng = Path(name), random.Random(given.seed)
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        maker = FORK.Process(target=_models, args=(home,))  # torch must not run before a fork
        maker.start()
        maker.join()
        config = ServeConfig(
            data=home / "data", database=given.database, base=str(home / "base"), port=port, devices=(),
            hypernet=str(home / "made"), finetune={"steps": 2, "batch": 1}, batch=4, lease=3.0,
            attempts=1000, webhook_hosts=("nobody.invalid",), webhook_tries=10**6, likeness=False,
        )  # fmt: skip
        prepare(config)
        print(json.dumps(_trial(config, given, rng)))


def _serve(config: Any) -> None:
    from hyperdreambooth.serve.run import serve
    from hyperdreambooth.workers import begin

    begin()  # whoever kills this program leaves no server behind
    serve(config)


def _models(home: Path) -> None:
    import micro
    from hyperdreambooth.base.load import load_base

    torch.set_num_threads(1)
    micro.save(home / "base")
    micro.hypernet(home, load_base(home / "base", device="cpu"))


def _trial(config: Any, given: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    trial, number = Trial(config, rng), 0
    try:
        while trial.kills.total() < given.kills or number < given.jobs:
            # half of the kills wait for a worker, so that work is done however slow the machine is
            patient, until = rng.random() < 0.5, time.monotonic() + rng.uniform(0.1, 4.0)
            while time.monotonic() < until or trial.kills.total() >= given.kills:
                number += number < given.jobs and trial.ask(number)
                time.sleep(rng.uniform(0, 0.1))
                if patient and not at_work(trial):
                    until = time.monotonic() + rng.uniform(0.1, 4.0)
                if number >= given.jobs and trial.kills.total() >= given.kills:
                    break
            if trial.kills.total() < given.kills:
                trial.kill()
        last = time.monotonic() + GIVEN_UP
        while (left := running(trial)) and time.monotonic() < last:
            time.sleep(0.5)
    finally:
        trial.end()
    return {"kills": dict(trial.kills), "accepted": len(trial.accepted), "left": left, "broken": check(trial)}


if __name__ == "__main__":
    main()
