"""The registered workers and their heartbeats."""

from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Engine, func
from sqlmodel import Session, col, delete, select

from server.database.engine import database_now, write_transaction
from server.jobs.ages import AgeWatch
from server.models.tables import Job, Worker, WorkerState
from server.settings import Settings

FORGET_AFTER = timedelta(days=1)


def register(engine: Engine, worker: Worker) -> None:
    """Store a worker, and delete workers without a heartbeat for FORGET_AFTER."""
    with write_transaction(engine) as session:
        now = database_now(session)
        session.exec(delete(Worker).where(col(Worker.heartbeat_at) < now - FORGET_AFTER))
        worker.started_at = worker.heartbeat_at = now
        session.add(worker)


def report_idle(engine: Engine, worker: Worker) -> None:
    """Record the heartbeat of an idle worker.

    It is stored again if it was deleted, as living workers are when a clock is set a day ahead.
    """
    with write_transaction(engine) as session:
        if session.get(Worker, worker.id) is None:
            session.add(Worker(**worker.model_dump()))
        touch(session, worker.id, job_id=None, state=WorkerState.idle)


def report_stopped(engine: Engine, worker_id: str) -> None:
    """Record that a worker ended normally."""
    with write_transaction(engine) as session:
        touch(session, worker_id, job_id=None, state=WorkerState.stopped)


def touch(
    session: Session,
    worker_id: str,
    *,
    job_id: str | None,
    state: WorkerState = WorkerState.busy,
) -> None:
    """Record a heartbeat in the caller's transaction."""
    worker = session.get(Worker, worker_id)
    if worker is not None:
        worker.heartbeat_at = database_now(session)
        worker.job_id = job_id
        worker.state = state


def watch_times(session: Session, watch: AgeWatch) -> None:
    """Let the watch look at the heartbeats of all workers and at the progress of their jobs."""
    rows = select(Worker.id, Worker.heartbeat_at, Job.id, Job.progress_at)
    times: dict[Hashable, datetime] = {}
    for worker_id, heartbeat_at, job_id, progress_at in session.exec(
        rows.join(Job, col(Worker.job_id) == Job.id, isouter=True)
    ):
        times["heartbeat", worker_id] = heartbeat_at
        if progress_at is not None:
            times["progress", job_id] = progress_at
    watch.look(times)


def count_live(
    session: Session, *, lease_seconds: float, watch: AgeWatch, host: str | None = None
) -> int:
    """The number of live workers of one host or of all hosts."""
    live = read_live(session, lease_seconds=lease_seconds, watch=watch)
    return sum(host in (None, worker.host) for worker, _ in live)


def count_unstopped(session: Session, *, host: str) -> int:
    """The number of workers of a host that have not ended normally: they live, or died."""
    unstopped = select(func.count()).select_from(Worker).where(Worker.host == host)
    return session.exec(unstopped.where(Worker.state != WorkerState.stopped)).one()


def read_live(
    session: Session, *, lease_seconds: float, watch: AgeWatch
) -> list[tuple[Worker, float]]:
    """The live workers, each with the seconds since its last heartbeat.

    They are not stopped, and not silent for longer than `lease_seconds`.
    """
    now = database_now(session)
    not_stopped = select(Worker).where(Worker.state != WorkerState.stopped)
    ages = [
        (worker, watch.correct(("heartbeat", worker.id), worker.heartbeat_at, now=now))
        for worker in session.exec(not_stopped)
    ]
    return [(worker, seconds) for worker, seconds in ages if seconds <= lease_seconds]


def describe_state(
    worker: Worker, *, job: Job | None, now: datetime, settings: Settings, watch: AgeWatch
) -> WorkerState:
    """The worker's reported state, or stalled, stale or dead if its last report is too old."""
    if worker.state == WorkerState.stopped:
        return WorkerState.stopped
    silent_seconds = watch.correct(("heartbeat", worker.id), worker.heartbeat_at, now=now)
    if silent_seconds > settings.lease_seconds:
        return WorkerState.dead
    if silent_seconds > 2 * settings.heartbeat_seconds:
        return WorkerState.stale
    if job is None or job.progress_at is None:
        return worker.state
    idle_seconds = watch.correct(("progress", job.id), job.progress_at, now=now)
    return WorkerState.stalled if idle_seconds > settings.stall_seconds else worker.state


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker with its current state, and its job if it has one."""

    worker: Worker
    state: WorkerState
    job: Job | None


def list_workers(
    session: Session, *, settings: Settings, limit: int, watch: AgeWatch
) -> list[WorkerReport]:
    """The workers by their last heartbeat, newest first."""
    rows = select(Worker, Job).join(Job, col(Worker.job_id) == Job.id, isouter=True)
    pairs = session.exec(rows.order_by(col(Worker.heartbeat_at).desc()).limit(limit)).all()
    now = database_now(session)
    return [
        WorkerReport(
            worker,
            describe_state(worker, job=job, now=now, settings=settings, watch=watch),
            job,
        )
        for worker, job in pairs
    ]
