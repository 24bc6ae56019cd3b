"""Monitoring: one log line per request, and Prometheus metrics."""

import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func
from sqlmodel import Session, col, select
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.database.engine import database_now, watch_commits
from server.jobs.ages import AgeWatch
from server.jobs.listing import count_by_status
from server.jobs.workers import read_live
from server.models.epochs import EpochMetrics
from server.models.tables import Job, JobStatus, Worker

_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_PATH_LENGTH: Final = 200
_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
#: The methods with their own label.
METHODS: Final = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
#: Requested every few seconds; at INFO their lines would hide all others.
_QUIET_PATHS: Final = ("/healthz", "/readyz", "/metrics")

_logger = logging.getLogger("losslab.access")


class RequestLog:
    """Gives each request an id and measures how long its answer takes to begin.

    The answer, its problem document and its log lines carry the id.
    """

    def __init__(self, app: ASGIApp, *, registry: CollectorRegistry) -> None:
        self._app = app
        self._latency = Histogram(
            "losslab_request_seconds",
            "From a request's headers to the first byte of its answer",
            ["method", "route", "status"],
            buckets=_BUCKETS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.request_id = _choose_id(request)
        request.state.commits = watch_commits()
        logs.request_id.set(request.state.request_id)
        started, method = time.perf_counter(), request.method

        async def send_measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request.state.request_id
                seconds = time.perf_counter() - started
                self._record(request, method, status=message["status"], seconds=seconds)
            await send(message)

        try:
            await self._app(scope, receive, send_measured)
        except Exception:
            # Starlette's outermost handler answers it.
            self._record(request, method, status=500, seconds=time.perf_counter() - started)
            raise

    def _record(self, request: Request, asked: str, *, status: int, seconds: float) -> None:
        route = getattr(request.scope.get("route"), "path", "none")
        # A client may invent methods, and each label uses memory until the process ends.
        method = asked if asked in METHODS else "other"
        self._latency.labels(method, route, status).observe(seconds)
        level = logging.DEBUG if request.scope["path"] in _QUIET_PATHS else logging.INFO
        # The raw path is percent-encoded and cannot break the line.
        path = request.scope["raw_path"].decode("latin-1")[:_MAX_PATH_LENGTH]
        values = {
            "method": asked,
            "path": path,
            "status": status,
            "milliseconds": round(1000 * seconds, 1),
            "token": getattr(request.state, "token_name", None),
        }
        _logger.log(
            level,
            "%(method)s %(path)s %(status)s %(milliseconds)s ms",
            values,
            extra={"values": values},
        )


def _choose_id(request: Request) -> str:
    """The client's own id if it is valid, else a new one."""
    given = request.headers.get("X-Request-ID", "")
    return given if _ID_PATTERN.fullmatch(given) else uuid.uuid4().hex


class StoreCollector(Collector):
    """Metrics from the database, read at each request and the same for all of its servers."""

    def __init__(self, engine: Engine, *, lease_seconds: float, watch: AgeWatch) -> None:
        self._engine = engine
        self._lease_seconds = lease_seconds
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        with Session(self._engine) as session:
            now = database_now(session)
            yield from _collect_jobs(session)
            yield from _collect_queue(session, now=now)
            yield from self._collect_workers(session)

    def _collect_workers(self, session: Session) -> Iterator[Metric]:
        age = _gauge("worker_heartbeat_age_seconds", "Since a worker's last heartbeat", "worker")
        seconds = _gauge("epoch_seconds", "Duration of the worker's newest epoch", "worker")
        speed = _gauge("grids_per_second", "Speed in the worker's newest epoch", "worker")
        live = read_live(session, lease_seconds=self._lease_seconds, watch=self._watch)
        for worker, silent_seconds in live:
            age.add_metric([worker.id], silent_seconds)
            if (epoch := _read_newest_epoch(session, worker)) is not None:
                seconds.add_metric([worker.id], epoch.seconds)
                speed.add_metric([worker.id], epoch.grids_per_second)
        yield from (age, seconds, speed)


def _collect_jobs(session: Session) -> Iterator[Metric]:
    jobs = _gauge("jobs", "Jobs by status", "status")
    for status, count in count_by_status(session).items():
        jobs.add_metric([status], count)
    failures = _gauge("failed_jobs", "Failed jobs by kind of failure", "failure_kind")
    failed = select(Job.failure_kind, func.count()).where(Job.status == JobStatus.failed)
    for kind, count in session.exec(failed.group_by(col(Job.failure_kind))):
        failures.add_metric([kind or "unknown"], count)
    requeued = select(func.sum(Job.num_requeues)).where(col(Job.num_requeues) > 0)
    requeues = _gauge("requeues", "Requeues of all stored jobs, by lost or stopping workers")
    requeues.add_metric([], session.exec(requeued).one() or 0)
    yield from (jobs, failures, requeues)


def _collect_queue(session: Session, *, now: datetime) -> Iterator[Metric]:
    queued = select(func.count(), func.min(Job.created_at)).where(Job.status == JobStatus.queued)
    depth, oldest_at = session.exec(queued).one()
    metric = _gauge("queue_depth", "Jobs that wait for a worker")
    metric.add_metric([], depth)
    age = _gauge("queue_oldest_seconds", "Since the oldest queued job was posted")
    age.add_metric([], _count_seconds(oldest_at, until=now) if oldest_at else 0.0)
    yield from (metric, age)


def _read_newest_epoch(session: Session, worker: Worker) -> EpochMetrics | None:
    epochs = select(EpochMetrics).where(EpochMetrics.job_id == worker.job_id)
    return session.exec(epochs.order_by(col(EpochMetrics.epoch).desc()).limit(1)).first()


def _count_seconds(moment: datetime, *, until: datetime) -> float:
    """Seconds between two times, at least 0: a row may be newer than the time that was read."""
    return max(0.0, (until - moment).total_seconds())


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"losslab_{name}", documentation, labels=labels)
