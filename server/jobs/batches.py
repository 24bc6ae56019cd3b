"""The queue's changes for many jobs at once: a study has up to two thousand.

Each function does for every job what its namesake in `server.jobs.queue` does for one, with a few
statements for all of them. The caller's transaction has locked the jobs, see `lock_jobs`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import delete, func, insert, select, update
from sqlmodel import Session, col

from server.database.engine import database_now
from server.database.notifications import notify_workers
from server.jobs.answers import forget_jobs
from server.jobs.queue import JobStateError
from server.models.tables import EventKind, FailureKind, Job, JobEvent, JobLabel, JobStatus

#: Fewer than SQLite's and PostgreSQL's limits of parameters in a statement.
_BATCH_SIZE: Final = 500
#: What a job without a worker has not; see `queue._settle`.
_SETTLED: Final = {
    "phase": None,
    "lease_expires_at": None,
    "available_at": None,
    "pause_requested_at": None,
}
#: What a resumed job has left behind; see `queue.resume`.
_RESUMED: Final = {
    **_SETTLED,
    "status": JobStatus.queued,
    "worker_id": None,
    "cancel_requested_at": None,
    "ended_at": None,
    "error_code": None,
    "error_message": None,
    "failure_kind": None,
    "num_lost_attempts": 0,
}


class LockedJob(NamedTuple):
    """The part of a job that says which changes its state allows."""

    id: str
    status: JobStatus
    failure_kind: FailureKind | None
    cancel_requested_at: datetime | None
    pause_requested_at: datetime | None
    epochs_completed: int

    @property
    def is_cancelling(self) -> bool:
        return not self.status.is_terminal and self.cancel_requested_at is not None

    @property
    def is_held(self) -> bool:
        """Whether a worker holds the job, and has to be asked to stop."""
        return self.status is JobStatus.running


def lock_jobs(session: Session, *conditions: Any, limit: int | None = None) -> list[LockedJob]:
    """The jobs that meet the conditions, locked in the order of their ids: two transactions that
    lock the same jobs do not wait for each other."""
    columns = [getattr(Job, name) for name in LockedJob._fields]
    rows = select(*columns).where(*conditions).order_by(col(Job.id)).limit(limit)
    return [LockedJob._make(row) for row in session.execute(rows.with_for_update())]


def enqueue_all(session: Session, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Store new jobs, each the values of its row, and let workers claim them in this order."""
    if not jobs:
        return
    now = database_now(session)
    # Workers claim the oldest first.
    rows = [
        {**job, "created_at": now + timedelta(microseconds=place)} for place, job in enumerate(jobs)
    ]
    session.execute(insert(Job), rows)
    labels = [
        {"job_id": job["id"], "key": key, "value": value, "created_at": job["created_at"]}
        for job in rows
        for key, value in job["labels"].items()
    ]
    if labels:
        session.execute(insert(JobLabel), labels)
    told = {job["id"]: f"option {job['option']} queued" for job in rows}
    _tell(session, told, kind=EventKind.queued, now=now)
    notify_workers(session)


def cancel_all(session: Session, jobs: Iterable[LockedJob]) -> None:
    """Cancel the jobs that have not ended; those that a worker holds are asked to stop."""
    now = database_now(session)
    live = [job for job in jobs if not job.status.is_terminal]
    loose = [job for job in live if not job.is_held]
    asked = [job for job in live if job.is_held and job.cancel_requested_at is None]
    first = func.coalesce(col(Job.cancel_requested_at), now)
    ended = {**_SETTLED, "status": JobStatus.cancelled, "ended_at": now}
    _change(session, loose, cancel_requested_at=first, **ended)
    _change(session, asked, cancel_requested_at=now)
    _tell_all(session, loose, kind=EventKind.cancelled, message="cancelled on request", now=now)
    _tell_all(session, asked, kind=EventKind.cancel_requested, message="cancel requested", now=now)


def pause_all(session: Session, jobs: Iterable[LockedJob]) -> None:
    """Pause the jobs that have not ended and are not being cancelled; those that a worker holds
    are asked to stop."""
    now = database_now(session)
    may_pause = (JobStatus.queued, JobStatus.running)
    live = [job for job in jobs if job.status in may_pause and not job.is_cancelling]
    loose = [job for job in live if not job.is_held]
    asked = [job for job in live if job.is_held and job.pause_requested_at is None]
    _change(session, loose, **_SETTLED, status=JobStatus.paused, ended_at=None)
    _change(session, asked, pause_requested_at=now)
    _tell_all(session, loose, kind=EventKind.paused, message="paused on request", now=now)
    _tell_all(session, asked, kind=EventKind.pause_requested, message="pause requested", now=now)


def resume_all(session: Session, jobs: Iterable[LockedJob], *, queued_by: str) -> None:
    """Queue the jobs that have stopped; of the others a request to pause is withdrawn.

    Raises JobStateError if one is about to be cancelled.
    """
    known = list(jobs)
    for job in known:
        if job.is_cancelling:
            raise JobStateError(f"job {job.id} is {job.status}; wait until it has stopped")
    now, live = database_now(session), (JobStatus.queued, JobStatus.running)
    stopped = [job for job in known if job.status not in live]
    asked = [job for job in known if job.status in live and job.pause_requested_at is not None]
    _change(session, stopped, **_RESUMED, queued_by=queued_by)
    _change(session, asked, pause_requested_at=None)
    told = {job.id: f"resumed after epoch {job.epochs_completed} on request" for job in stopped}
    _tell(session, told, kind=EventKind.queued, now=now)
    if stopped:
        notify_workers(session)


def remove_all(session: Session, jobs: Iterable[LockedJob]) -> None:
    """Delete the rows of jobs. Raises JobStateError if one has not ended."""
    known = list(jobs)
    for job in known:
        if not job.status.is_terminal:
            raise JobStateError(f"job {job.id} is {job.status}; cancel it before deleting it")
    for ids in _divide(job.id for job in known):
        session.execute(delete(Job).where(col(Job.id).in_(ids)), execution_options=_UNSEEN)
        forget_jobs(session, ids)


#: No job of the session's objects is one of these.
_UNSEEN: Final = {"synchronize_session": False}


def _change(session: Session, jobs: Iterable[LockedJob], **values: Any) -> None:
    for ids in _divide(job.id for job in jobs):
        changed = update(Job).where(col(Job.id).in_(ids)).values(**values)
        session.execute(changed, execution_options=_UNSEEN)


def _tell_all(
    session: Session, jobs: Iterable[LockedJob], *, kind: EventKind, message: str, now: datetime
) -> None:
    _tell(session, {job.id: message for job in jobs}, kind=kind, now=now)


def _tell(session: Session, messages: Mapping[str, str], *, kind: EventKind, now: datetime) -> None:
    """Record an event of each job."""
    events = [
        {"job_id": job_id, "kind": kind, "message": message, "created_at": now}
        for job_id, message in messages.items()
    ]
    if events:
        session.execute(insert(JobEvent), events)


def _divide(ids: Iterable[str]) -> Iterator[list[str]]:
    known = list(ids)
    for first in range(0, len(known), _BATCH_SIZE):
        yield known[first : first + _BATCH_SIZE]
