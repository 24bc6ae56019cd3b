"""Every change that is made to a job from outside its attempt; nothing else changes its status.

new -> queued (enqueue, as `server.jobs.submission` does)
queued -> running (claim) -> succeeded (finish) | failed (fail) | cancelled, paused (stop)
running -> queued (hand_back or fail of infrastructure by its worker, requeue_lost_jobs)
running -> failed (requeue_lost_jobs, after too many attempts)
running -> cancelled, paused (any of these, or cancel and pause themselves once the lease is over,
if that was asked)
queued -> cancelled (cancel) | paused (pause); paused -> cancelled (cancel)
paused, failed, cancelled, and succeeded with more epochs -> queued (resume)

What a worker does to its job needs the lease that its claim gave it: see `server.jobs.leases`.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, and_, func, or_, update
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from server.database.engine import database_now, write_transaction
from server.database.notifications import notify_workers
from server.errors import ConflictError
from server.jobs.events import add_event
from server.jobs.leases import Lease, holding
from server.jobs.listing import JobNotFoundError
from server.models.configuration import TrainingConfig
from server.models.tables import EventKind, FailureKind, Job, JobPhase, JobStatus


class JobStateError(ConflictError):
    """The job's status does not allow this."""


def enqueue(
    session: Session, job: Job, *, message: str, available_at: datetime | None = None
) -> None:
    """Let workers claim the job, from `available_at` on; part of the caller's transaction."""
    job.status = JobStatus.queued
    job.phase = job.worker_id = job.lease_expires_at = None
    job.available_at = available_at
    add_event(session, job, EventKind.queued, message=message)
    notify_workers(session)


def count_queued(session: Session, *, job_id: str | None = None) -> int:
    """How many jobs wait, including those whose retry is not due yet."""
    waiting = select(func.count()).select_from(Job).where(Job.status == JobStatus.queued)
    if job_id is not None:
        waiting = waiting.where(Job.id == job_id)
    return session.exec(waiting).one()


def claim(
    engine: Engine, *, worker_id: str, lease_seconds: float, job_id: str | None = None
) -> Job | None:
    """Give the most urgent queued job, then the oldest, to this worker; None if none waits.

    With `job_id` only that job is taken.
    """
    # A plain look first: idle workers should not take SQLite's write lock at every poll.
    with Session(engine) as session:
        waiting = _select_waiting(database_now(session), job_id=job_id)
        if session.exec(waiting.limit(1)).first() is None:
            return None
    first = waiting.limit(1).with_for_update(skip_locked=True).scalar_subquery()
    with write_transaction(engine) as session:
        now = database_now(session)
        taken = update(Job).where(col(Job.id) == first).values(
            status=JobStatus.running,
            phase=JobPhase.loading_data,
            attempt=col(Job.attempt) + 1,
            worker_id=worker_id,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
            claimed_at=now,
            claimed_progress=col(Job.progress),
            progress_at=now,
            started_at=func.coalesce(col(Job.started_at), now),
        )  # fmt: skip
        job = session.scalars(taken.returning(Job)).first()
        if job is not None:
            message = f"attempt {job.attempt} started by worker {worker_id}"
            add_event(session, job, EventKind.running, message=message)
    return job


def _select_waiting(now: datetime, *, job_id: str | None) -> SelectOfScalar[str]:
    """Ids of the jobs that may be claimed now, the most urgent first, or of that one job."""
    due = or_(col(Job.available_at).is_(None), col(Job.available_at) <= now)
    if job_id is not None:
        # A reservation is for whoever asks for the job; a pause between attempts is for all.
        due = and_(col(Job.id) == job_id, or_(due, col(Job.attempt) == 0))
    waiting = select(Job.id).where(Job.status == JobStatus.queued, due)
    return waiting.order_by(col(Job.priority).desc(), col(Job.created_at), col(Job.id))


def finish(engine: Engine, lease: Lease, *, test_metrics: dict[str, Any]) -> None:
    """End a job whose planned epochs all ran. Raises LeaseLostError."""
    with holding(engine, lease) as (session, job):
        job.test_metrics = test_metrics
        job.progress = 1.0
        message = f"all {job.epochs_completed} epochs ran"
        _settle(session, job, JobStatus.succeeded, message=message)


def fail(
    engine: Engine,
    lease: Lease,
    *,
    code: str,
    message: str,
    kind: FailureKind,
    max_attempts: int = 1,
    retry_seconds: float = 0.0,
) -> None:
    """End an attempt by an error. Raises LeaseLostError.

    A failure of kind `infrastructure` is tried again, first after `retry_seconds` and then
    each time after twice as long, until `max_attempts` have gone that way.
    """
    with holding(engine, lease) as (session, job):
        if kind is FailureKind.infrastructure:
            delay = timedelta(seconds=retry_seconds * 2**job.num_lost_attempts)
            _lose(session, job, code=code, reason=message, max_attempts=max_attempts, delay=delay)
        else:
            _fail(session, job, code=code, message=message, kind=kind)


def stop(engine: Engine, lease: Lease) -> None:
    """End an attempt as its job was asked to. Raises LeaseLostError."""
    with holding(engine, lease) as (session, job):
        if not _settle_as_requested(session, job):
            # The request was withdrawn after the worker had heard of it.
            _requeue(session, job, reason="asked to stop, and then to go on")


def hand_back(engine: Engine, lease: Lease, *, reason: str) -> None:
    """Return a running job to the queue, for any worker to go on. Raises LeaseLostError.

    This does not count as a lost attempt: its worker was told to stop.
    """
    with holding(engine, lease) as (session, job):
        if not _settle_as_requested(session, job):
            _requeue(session, job, reason=reason)


def requeue_lost_jobs(engine: Engine, *, max_attempts: int, lease_seconds: float) -> int:
    """Take running jobs whose lease ran out from their workers; any worker may call this.

    After `max_attempts` losses a job fails as `infrastructure`. Returns how many were lost.
    """
    with Session(engine) as session:
        expired = select(Job).where(
            Job.status == JobStatus.running, col(Job.lease_expires_at) < database_now(session)
        )
        if session.exec(expired.limit(1)).first() is None:
            return 0
    with write_transaction(engine) as session:
        jobs = session.exec(expired.with_for_update(skip_locked=True)).all()
        for job in jobs:
            reason = f"worker {job.worker_id} sent no heartbeat for {lease_seconds:g} s"
            _lose(session, job, code="worker_lost", reason=reason, max_attempts=max_attempts)
    return len(jobs)


def cancel(engine: Engine, job_id: str) -> Job:
    """Ask a job to stop: a queued or paused one at once, a running one at its next step.

    A second request changes nothing. Raises JobStateError if the job ended otherwise.
    """
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if job.status in (JobStatus.succeeded, JobStatus.failed):
            raise JobStateError(f"job {job.id} has {job.status}; only a live job can be cancelled")
        if job.status != JobStatus.cancelled:
            is_asked = job.cancel_requested_at is not None
            job.cancel_requested_at = job.cancel_requested_at or database_now(session)
            _stop_or_ask(session, job, EventKind.cancel_requested, is_asked=is_asked)
    return job


def pause(engine: Engine, job_id: str) -> Job:
    """Ask a job to stop until it is resumed: a queued one at once, a running one at its next
    step. A second request changes nothing. Raises JobStateError if the job ended."""
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if job.status.is_terminal or job.cancel_requested_at is not None:
            state = f"is {job.status}" if job.status.is_terminal else "is being cancelled"
            raise JobStateError(f"job {job.id} {state}; only a queued or running job can pause")
        if job.status != JobStatus.paused:
            is_asked = job.pause_requested_at is not None
            job.pause_requested_at = job.pause_requested_at or database_now(session)
            _stop_or_ask(session, job, EventKind.pause_requested, is_asked=is_asked)
    return job


def resume(engine: Engine, job_id: str, *, num_epochs: int | None = None) -> Job:
    """Let a paused, failed or cancelled job go on from its last good checkpoint, or a
    succeeded one up to `num_epochs`; a live job is left alone. Raises JobStateError."""
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if job.status in (JobStatus.queued, JobStatus.running):
            if job.cancel_requested_at is not None or num_epochs is not None:
                raise JobStateError(f"job {job.id} is {job.status}; wait until it has stopped")
            job.pause_requested_at = None
            return job
        if num_epochs is not None or job.status == JobStatus.succeeded:
            _extend(job, num_epochs=num_epochs)
        job.cancel_requested_at = job.pause_requested_at = job.ended_at = None
        job.error_code = job.error_message = job.failure_kind = None
        job.num_lost_attempts = 0
        enqueue(session, job, message=f"resumed after epoch {job.epochs_completed} on request")
    return job


def remove(engine: Engine, job_id: str, *, delete_files: Callable[[], None] | None = None) -> None:
    """Delete a job that has ended, with its rows, and its files as `delete_files` does it: if
    that fails, the job stays to be deleted again. Raises JobStateError."""
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if not job.status.is_terminal:
            raise JobStateError(f"job {job.id} is {job.status}; cancel it before deleting it")
        session.delete(job)
        session.flush()
        if delete_files is not None:
            delete_files()


def pin(engine: Engine, job_id: str, *, is_pinned: bool) -> Job:
    """Keep a job's checkpoints when space is needed, or no longer. Raises JobNotFoundError."""
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        job.is_pinned = is_pinned
    return job


def _lock(session: Session, job_id: str) -> Job:
    job = session.exec(select(Job).where(Job.id == job_id).with_for_update()).first()
    if job is None:
        raise JobNotFoundError(job_id)
    return job


def _stop_or_ask(session: Session, job: Job, request: EventKind, *, is_asked: bool) -> None:
    """Do at once what was requested if no worker is at it, else leave it to the worker."""
    expires_at = job.lease_expires_at  # of running jobs alone
    if expires_at is None or expires_at < database_now(session):
        _settle_as_requested(session, job)
    elif not is_asked:
        add_event(session, job, request, message=request.replace("_", " "))


def _settle_as_requested(session: Session, job: Job, *, reason: str = "on request") -> bool:
    if job.cancel_requested_at is not None:
        _settle(session, job, JobStatus.cancelled, message=f"cancelled {reason}")
    elif job.pause_requested_at is not None:
        _settle(session, job, JobStatus.paused, message=f"paused {reason}")
    else:
        return False
    return True


def _settle(session: Session, job: Job, status: JobStatus, *, message: str) -> None:
    """Take a live job out of the workers' reach."""
    assert not JobStatus(job.status).is_terminal
    job.status = status
    job.phase = job.lease_expires_at = job.available_at = job.pause_requested_at = None
    job.ended_at = database_now(session) if status.is_terminal else None
    add_event(session, job, EventKind(status), message=message)


def _lose(
    session: Session,
    job: Job,
    *,
    code: str,
    reason: str,
    max_attempts: int,
    delay: timedelta | None = None,
) -> None:
    """An attempt ended by no fault of its job: try again, but not for ever."""
    job.num_lost_attempts += 1
    if _settle_as_requested(session, job, reason=f"on request; {reason}"):
        return
    if job.num_lost_attempts >= max_attempts:
        message = f"{reason} (attempt {job.num_lost_attempts} of {max_attempts})"
        _fail(session, job, code=code, message=message, kind=FailureKind.infrastructure)
    else:
        _requeue(session, job, reason=reason, delay=delay)


def _fail(session: Session, job: Job, *, code: str, message: str, kind: FailureKind) -> None:
    job.error_code, job.error_message, job.failure_kind = code, message, kind
    _settle(session, job, JobStatus.failed, message=message)


def _requeue(session: Session, job: Job, *, reason: str, delay: timedelta | None = None) -> None:
    job.num_requeues += 1
    message = f"requeued: {reason}"
    available_at: datetime | None = None
    if delay:
        available_at = database_now(session) + delay
        message += f"; next attempt in {delay.total_seconds():g} s"
    enqueue(session, job, message=message, available_at=available_at)


def _extend(job: Job, *, num_epochs: int | None) -> None:
    if num_epochs is None or num_epochs <= job.epochs_completed:
        raise JobStateError(
            f"job {job.id} has {job.epochs_completed} epochs behind it; "
            "`epochs` must say up to which later one it shall go on"
        )
    config = {**job.config, "epochs": num_epochs}
    job.config = TrainingConfig.model_validate(config).model_dump(mode="json")
    job.progress = job.epochs_completed / num_epochs
    job.test_metrics = None
