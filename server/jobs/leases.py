"""Leases: a worker's right to write to its running job, renewed by each heartbeat.

A claim raises the job's `attempt` and sets a lease. The worker makes every later write while
`holding` the lease: the job's row is locked and must match job, attempt, worker and status
`running`, else `LeaseLostError` is raised.

No clock's time of day ends a lease: clocks are set, and machines sleep. A reaper ends it that has
watched the lease for long enough and saw no heartbeat renew it, see `server.jobs.reaper`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.database.engine import database_now, write_transaction
from server.errors import ConflictError
from server.jobs.workers import touch
from server.models.tables import Job, JobStatus


class LeaseLostError(ConflictError):
    """The job no longer belongs to this worker, which must not write to it any more."""


class StopRequest(StrEnum):
    """A request that a running job follows at its next step; a cancel overrides a pause."""

    cancel = "cancel"
    pause = "pause"


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to write to a job; the attempt is the fencing token."""

    job_id: str
    attempt: int
    worker_id: str


class SeenLease(NamedTuple):
    """A running job's lease as it was read. Every heartbeat changes `expires_at`, so that two equal
    ones mean: no heartbeat between them."""

    job_id: str
    attempt: int
    worker_id: str
    expires_at: datetime


def read_leases(session: Session) -> list[SeenLease]:
    """The leases of all running jobs."""
    columns = (col(Job.id), col(Job.attempt), col(Job.worker_id), col(Job.lease_expires_at))
    running = sqlalchemy.select(*columns).where(col(Job.status) == JobStatus.running)
    return [
        SeenLease(job_id, attempt, worker_id, expires_at)
        for job_id, attempt, worker_id, expires_at in session.execute(running)
        if worker_id is not None and expires_at is not None  # as those of all running jobs are
    ]


@contextmanager
def holding(engine: Engine, lease: Lease) -> Iterator[tuple[Session, Job]]:
    """A write transaction during which no other process can take the job from its worker.

    Raises LeaseLostError.
    """
    held = select(Job).where(*_fence(lease)).with_for_update()
    with write_transaction(engine) as session:
        job = session.exec(held).first()
        if job is None:
            raise LeaseLostError(f"job {lease.job_id} was taken from worker {lease.worker_id}")
        yield session, job


def heartbeat(engine: Engine, lease: Lease, *, lease_seconds: float, progress: float) -> None:
    """Renew the lease. Raises LeaseLostError."""
    with holding(engine, lease) as (session, job):
        now = database_now(session)
        job.lease_expires_at = now + timedelta(seconds=lease_seconds)
        if progress > job.progress:
            job.progress, job.progress_at = progress, now
        touch(session, lease.worker_id, job_id=lease.job_id)


def read_stop_request(engine: Engine, lease: Lease) -> StopRequest | None:
    """The stop request of this running job, if any. Raises LeaseLostError."""
    requests = select(Job.cancel_requested_at, Job.pause_requested_at).where(*_fence(lease))
    with Session(engine) as session:
        row = session.exec(requests).first()
    if row is None:
        raise LeaseLostError(f"job {lease.job_id} was taken from worker {lease.worker_id}")
    cancelled_at, paused_at = row
    if cancelled_at is not None:
        return StopRequest.cancel
    return StopRequest.pause if paused_at is not None else None


def _fence(lease: Lease) -> tuple[Any, ...]:
    return (
        Job.id == lease.job_id,
        Job.attempt == lease.attempt,
        Job.worker_id == lease.worker_id,
        Job.status == JobStatus.running,
    )
