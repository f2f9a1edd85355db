"""What Prometheus reads at `/metrics`: the queue and the workers from the database, requests from memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy import func, select

from hyperdreambooth.serve.database import Database
from hyperdreambooth.serve.tables import Delivery, Job, Person, Worker

SILENT = 15.0  # seconds after which a worker counts as gone
_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120)


class Metrics:
    """The figures of one process; a route is named by its pattern, so that no id is in them."""

    def __init__(self, database: Database) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(database))
        self.requests = Counter(
            "hdb_requests", "Requests by route and status.", ("method", "route", "status"),
            registry=self._registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "hdb_request_seconds", "Seconds until an answer began.", ("route",), buckets=_BUCKETS,
            registry=self._registry,
        )  # fmt: skip

    def page(self) -> bytes:
        """Returns the figures in Prometheus' text format."""
        return generate_latest(self._registry)


class _Collector:
    """Counts rows whenever somebody asks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def collect(self) -> Iterator[Any]:
        """Yields the figures that are rows of the database."""
        with self._database.read() as session:
            jobs = GaugeMetricFamily("hdb_jobs", "Jobs by kind and state.", labels=("kind", "state"))
            counted = select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state)
            for kind, state, count in session.execute(counted):
                jobs.add_metric((kind, state), count)
            yield jobs
            oldest = session.scalar(select(func.min(Job.created)).where(Job.state == "queued"))
            age = time.time() - oldest if oldest else 0.0
            yield GaugeMetricFamily("hdb_oldest_waiting_seconds", "Age of the oldest waiting job.", age)
            alive = select(func.count()).select_from(Worker).where(Worker.seen > time.time() - SILENT)
            for name, text, query in (
                ("hdb_workers", "Workers that were heard of lately.", alive),
                ("hdb_people", "People who are kept.", select(func.count()).select_from(Person)),
                ("hdb_webhooks_waiting", "Webhooks that have not arrived.",
                 select(func.count()).select_from(Delivery)),
            ):  # fmt: skip
                yield GaugeMetricFamily(name, text, session.scalar(query) or 0)
