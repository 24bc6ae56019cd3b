"""The registered workers and their heartbeats."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Engine, func
from sqlmodel import Session, col, delete, select
from sqlmodel.sql.expression import SelectOfScalar

from server.database.engine import database_now, write_transaction
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


def report_idle(engine: Engine, worker_id: str) -> None:
    """Record the heartbeat of an idle worker."""
    with write_transaction(engine) as session:
        touch(session, worker_id, job_id=None, state=WorkerState.idle)


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


def count_live(session: Session, *, lease_seconds: float, host: str | None = None) -> int:
    """The number of live workers of one host or of all hosts."""
    live = select_live(database_now(session), lease_seconds=lease_seconds)
    if host is not None:
        live = live.where(Worker.host == host)
    return session.exec(select(func.count()).select_from(live.subquery())).one()


def select_live(now: datetime, *, lease_seconds: float) -> SelectOfScalar[Worker]:
    """The live workers: not stopped, and with a heartbeat in the last `lease_seconds`."""
    since = now - timedelta(seconds=lease_seconds)
    live = col(Worker.heartbeat_at) >= since
    return select(Worker).where(live, Worker.state != WorkerState.stopped)


def describe_state(
    worker: Worker, *, job: Job | None, now: datetime, settings: Settings
) -> WorkerState:
    """The worker's reported state, or stalled, stale or dead if its last report is too old."""
    if worker.state == WorkerState.stopped:
        return WorkerState.stopped
    silent_seconds = (now - worker.heartbeat_at).total_seconds()
    if silent_seconds > settings.lease_seconds:
        return WorkerState.dead
    if silent_seconds > 2 * settings.heartbeat_seconds:
        return WorkerState.stale
    progress_at = job.progress_at if job is not None else None
    if progress_at and (now - progress_at).total_seconds() > settings.stall_seconds:
        return WorkerState.stalled
    return worker.state


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker with its current state, and its job if it has one."""

    worker: Worker
    state: WorkerState
    job: Job | None


def list_workers(session: Session, *, settings: Settings, limit: int) -> list[WorkerReport]:
    """The workers by their last heartbeat, newest first."""
    rows = select(Worker, Job).join(Job, col(Worker.job_id) == Job.id, isouter=True)
    pairs = session.exec(rows.order_by(col(Worker.heartbeat_at).desc()).limit(limit)).all()
    now = database_now(session)
    return [
        WorkerReport(worker, describe_state(worker, job=job, now=now, settings=settings), job)
        for worker, job in pairs
    ]
