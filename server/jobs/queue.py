"""The job queue: all changes of a job's status. `server.jobs.batches` makes them for many jobs at
once; no other module makes any.

new -> queued (enqueue, as `server.jobs.submission` does)
queued -> running (claim) -> succeeded (finish) | failed (fail) | cancelled, paused (stop)
running -> queued (hand_back or fail of infrastructure by its worker, requeue_lost_jobs)
running -> failed (requeue_lost_jobs, after too many attempts)
running -> cancelled, paused (any of these if that was requested)
queued -> cancelled (cancel) | paused (pause); paused -> cancelled (cancel)
paused, failed, cancelled, and succeeded with more epochs -> queued (resume)

A worker's changes need the lease of its claim, see `server.jobs.leases`.
"""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine, and_, func, or_, update
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar

from server.database.engine import database_now, write_transaction
from server.database.notifications import notify_workers
from server.errors import ConflictError
from server.jobs.admission import Admission
from server.jobs.answers import forget_jobs
from server.jobs.events import add_event
from server.jobs.leases import Lease, SeenLease, holding
from server.jobs.listing import JobNotFoundError
from server.jobs.workers import touch
from server.models.configuration import check_config, compute_config_sha256
from server.models.studies import StudyJob
from server.models.tables import EventKind, FailureKind, Job, JobPhase, JobStatus
from server.texts import shorten

#: A job's failure is read by people; a library's message may hold a whole listing.
_MAX_ERROR_CHARACTERS: Final = 8000


class JobStateError(ConflictError):
    """The job's status does not allow the request."""


def enqueue(
    session: Session, job: Job, *, message: str, available_at: datetime | None = None
) -> None:
    """Let workers claim the job from `available_at` on, as part of the caller's transaction."""
    job.status = JobStatus.queued
    job.phase = job.worker_id = job.lease_expires_at = None
    job.available_at = available_at
    add_event(session, job, EventKind.queued, message=message)
    notify_workers(session)


def claim(
    engine: Engine, *, worker_id: str, lease_seconds: float, job_id: str | None = None
) -> Job | None:
    """Give this worker the queued job with the highest priority: of several first one that was
    interrupted, then the oldest.

    Returns None if no job waits. With `job_id`, only that job is claimed.
    """
    # Read first: idle workers should not take SQLite's write lock at every poll.
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
            touch(session, worker_id, job_id=job.id)
    return job


def _select_waiting(now: datetime, *, job_id: str | None) -> SelectOfScalar[str]:
    """Ids of the jobs that may be claimed now in the order of claims, or only `job_id`."""
    # Before the time at which the delay was set: the clock was set back, and a delay of seconds
    # would last for hours.
    is_set_back = func.coalesce(col(Job.progress_at), col(Job.created_at)) > now
    due = or_(col(Job.available_at).is_(None), col(Job.available_at) <= now, is_set_back)
    if job_id is not None:
        # A worker that names the job ignores its reservation, but not a delay between attempts.
        due = and_(col(Job.id) == job_id, or_(due, col(Job.attempt) == 0))
    waiting = select(Job.id).where(Job.status == JobStatus.queued, due)
    return waiting.order_by(
        col(Job.priority).desc(), (col(Job.attempt) > 0).desc(), col(Job.created_at), col(Job.id)
    )


def finish(
    engine: Engine,
    lease: Lease,
    *,
    test_metrics: dict[str, Any],
    likelihood_test_metrics: dict[str, Any] | None = None,
) -> None:
    """End a job whose planned epochs all ran. Raises LeaseLostError."""
    with holding(engine, lease) as (session, job):
        job.test_metrics, job.likelihood_test_metrics = test_metrics, likelihood_test_metrics
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
    """End an attempt with an error. Raises LeaseLostError.

    After a failure of kind `infrastructure` the job is tried again, first after `retry_seconds`,
    then each time after twice as long, until `max_attempts` attempts were lost.
    """
    with holding(engine, lease) as (session, job):
        if kind is FailureKind.infrastructure:
            delay = timedelta(seconds=retry_seconds * 2**job.num_lost_attempts)
            _retry_or_fail(
                session, job, code=code, reason=message, max_attempts=max_attempts, delay=delay
            )
        else:
            _fail(session, job, code=code, message=message, kind=kind)


def stop(engine: Engine, lease: Lease) -> None:
    """End an attempt as requested by a cancel or pause. Raises LeaseLostError."""
    with holding(engine, lease) as (session, job):
        if not _settle_as_requested(session, job):
            # The request was withdrawn after the worker had read it.
            _requeue(session, job, reason="the request to stop was withdrawn")


def hand_back(engine: Engine, lease: Lease, *, reason: str) -> None:
    """Return a running job to the queue, so that any worker can continue it.

    This does not count as a lost attempt, since the worker was told to stop. Raises LeaseLostError.
    """
    with holding(engine, lease) as (session, job):
        if not _settle_as_requested(session, job):
            _requeue(session, job, reason=reason)


def requeue_lost_jobs(
    session: Session, silent: Iterable[SeenLease], *, max_attempts: int, lease_seconds: float
) -> int:
    """Requeue the running jobs with these leases, as a part of the caller's transaction.

    A job whose worker has sent a heartbeat since its lease was read is left alone. After
    `max_attempts` lost attempts a job fails as `infrastructure`. Returns the number of jobs.
    """
    num_lost = 0
    for lease in silent:
        held = select(Job).where(
            Job.id == lease.job_id,
            Job.attempt == lease.attempt,
            Job.status == JobStatus.running,
            Job.lease_expires_at == lease.expires_at,
        )
        job = session.exec(held.with_for_update(skip_locked=True)).first()
        if job is None:
            continue
        reason = f"worker {job.worker_id} sent no heartbeat for {lease_seconds:g} s"
        _retry_or_fail(session, job, code="worker_lost", reason=reason, max_attempts=max_attempts)
        num_lost += 1
    return num_lost


def cancel(engine: Engine, job_id: str) -> Job:
    """Ask a job to stop: a queued or paused one at once, a running one at its next step.

    A repeated request changes nothing. Raises JobStateError if the job has succeeded or failed.
    """
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if job.status in (JobStatus.succeeded, JobStatus.failed):
            raise JobStateError(f"job {job.id} has {job.status}; only a live job can be cancelled")
        if job.status != JobStatus.cancelled:
            is_requested = job.cancel_requested_at is not None
            job.cancel_requested_at = job.cancel_requested_at or database_now(session)
            _stop_or_request(session, job, EventKind.cancel_requested, is_requested=is_requested)
    return job


def pause(engine: Engine, job_id: str) -> Job:
    """Ask a job to stop until it is resumed: a queued one at once, a running one at its next step.

    A repeated request changes nothing. Raises JobStateError if the job has ended or is being
    cancelled.
    """
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if job.status.is_terminal or job.cancel_requested_at is not None:
            state = f"is {job.status}" if job.status.is_terminal else "is being cancelled"
            raise JobStateError(f"job {job.id} {state}; only a queued or running job can pause")
        if job.status != JobStatus.paused:
            is_requested = job.pause_requested_at is not None
            job.pause_requested_at = job.pause_requested_at or database_now(session)
            _stop_or_request(session, job, EventKind.pause_requested, is_requested=is_requested)
    return job


def resume(
    engine: Engine,
    job_id: str,
    *,
    num_epochs: int | None = None,
    dataset_sha256: str | None = None,
    admission: Admission | None = None,
) -> Job:
    """Queue a paused, failed or cancelled job to go on from its last valid checkpoint, or a
    succeeded one to train up to `num_epochs`.

    A queued or running job is not changed, except that a pause request is withdrawn. Raises
    JobStateError, and what `admission` raises.
    """
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        is_live = job.status in (JobStatus.queued, JobStatus.running)
        if is_live and num_epochs is not None:
            raise JobStateError(f"job {job.id} is {job.status}; wait until it has stopped")
        if num_epochs is not None or job.status == JobStatus.succeeded:
            _extend(session, job, num_epochs=num_epochs, dataset_sha256=dataset_sha256)
        _resume(session, job, admission=admission)
    return job


def _resume(session: Session, job: Job, *, admission: Admission | None) -> None:
    if job.status in (JobStatus.queued, JobStatus.running):
        if job.cancel_requested_at is not None:
            raise JobStateError(f"job {job.id} is {job.status}; wait until it has stopped")
        job.pause_requested_at = None
        return
    config = check_config(job.config)
    if admission is not None:
        admission.check(session, num_jobs=1, datasets=[config.dataset])
        job.queued_by = admission.queued_by
    job.cancel_requested_at = job.pause_requested_at = job.ended_at = None
    job.error_code = job.error_message = job.failure_kind = None
    job.num_lost_attempts = 0
    enqueue(session, job, message=f"resumed after epoch {job.epochs_completed} on request")


def remove(engine: Engine, job_id: str, *, delete_files: Callable[[], None] | None = None) -> None:
    """Delete a job that has ended, with its rows, and its files by `delete_files`.

    If `delete_files` fails, the job stays and can be deleted again. Raises JobStateError.
    """
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        if not job.status.is_terminal:
            raise JobStateError(f"job {job.id} is {job.status}; cancel it before deleting it")
        session.delete(job)
        forget_jobs(session, [job.id])
        session.flush()
        if delete_files is not None:
            delete_files()


def pin(engine: Engine, job_id: str, *, is_pinned: bool) -> Job:
    """Set whether a job's checkpoints stay when space is needed. Raises JobNotFoundError."""
    with write_transaction(engine) as session:
        job = _lock(session, job_id)
        job.is_pinned = is_pinned
    return job


def _lock(session: Session, job_id: str) -> Job:
    job = session.exec(select(Job).where(Job.id == job_id).with_for_update()).first()
    if job is None:
        raise JobNotFoundError(job_id)
    return job


def _stop_or_request(session: Session, job: Job, request: EventKind, *, is_requested: bool) -> None:
    """Stop the job at once if no worker holds it, else leave the request to the worker.

    If the worker is dead, the reaper finds the request.
    """
    if job.status != JobStatus.running:
        _settle_as_requested(session, job)
    elif not is_requested:
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
    """Give a live job a status in which no worker claims it or writes to it."""
    assert not JobStatus(job.status).is_terminal
    job.status = status
    job.phase = job.lease_expires_at = job.available_at = job.pause_requested_at = None
    job.ended_at = database_now(session) if status.is_terminal else None
    add_event(session, job, EventKind(status), message=message)


def _retry_or_fail(
    session: Session,
    job: Job,
    *,
    code: str,
    reason: str,
    max_attempts: int,
    delay: timedelta | None = None,
) -> None:
    """Requeue a job that lost an attempt through no fault of its own; fail it after too many."""
    job.num_lost_attempts += 1
    if _settle_as_requested(session, job, reason=f"on request; {reason}"):
        return
    if job.num_lost_attempts >= max_attempts:
        message = f"{reason} (attempt {job.num_lost_attempts} of {max_attempts})"
        _fail(session, job, code=code, message=message, kind=FailureKind.infrastructure)
    else:
        _requeue(session, job, reason=reason, delay=delay)


def _fail(session: Session, job: Job, *, code: str, message: str, kind: FailureKind) -> None:
    message = shorten(message, length=_MAX_ERROR_CHARACTERS)
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


def _extend(
    session: Session, job: Job, *, num_epochs: int | None, dataset_sha256: str | None
) -> None:
    if num_epochs is None or num_epochs <= job.epochs_completed:
        raise JobStateError(
            f"job {job.id} has completed {job.epochs_completed} epochs; "
            "`epochs` must be larger than that"
        )
    if study_id := _find_study(session, job):
        raise JobStateError(
            f"job {job.id} belongs to study {study_id}, whose jobs train equally long"
        )
    config = check_config({**job.config, "epochs": num_epochs})
    job.config = config.model_dump(mode="json")
    job.config_sha256 = compute_config_sha256(config, dataset_sha256=dataset_sha256)
    job.progress = job.epochs_completed / num_epochs
    job.test_metrics = job.likelihood_test_metrics = None


def _find_study(session: Session, job: Job) -> str | None:
    """A study that counts the job: the one that made it, or one that reuses it."""
    users = select(StudyJob.study_id).where(StudyJob.job_id == job.id)
    return session.exec(users.limit(1)).first()
