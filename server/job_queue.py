"""Every change of a job's state, and nothing else changes it.

queued -> running (claim) -> succeeded (finish) | failed (fail) | cancelled (acknowledge_cancel)
running -> queued (hand_back by its worker, requeue_lost_jobs after its lease ran out)
queued -> cancelled (cancel)

A claim raises `attempt` and sets a lease. Every later write of the worker names job, attempt
and worker; if no running job matches, the lease is lost and `LeaseLostError` is raised.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, func
from sqlmodel import Session, col, delete, select

from server.database import database_now, write_transaction
from server.models import (
    Artifact,
    EpochMetrics,
    FailureKind,
    Job,
    JobEvent,
    JobPhase,
    JobStatus,
    Option,
    TrainingConfig,
    Worker,
)


class LeaseLostError(Exception):
    """The job is not this worker's any more; the worker must write nothing more."""


class JobStateError(Exception):
    """The job's status does not allow this."""


class QueueFullError(Exception):
    """As many jobs wait as are allowed to."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What entitles a worker to write to a job: the claim's attempt is the fencing token."""

    job_id: str
    attempt: int
    worker_id: str


def submit(
    engine: Engine,
    *,
    option: Option,
    config: TrainingConfig,
    quick_test: bool = False,
    name: str | None = None,
    labels: dict[str, str] | None = None,
    priority: int = 0,
    max_queued_jobs: int | None = None,
) -> Job:
    """Queue a job; it is committed on return. Raises QueueFullError."""
    job = Job(
        option=option,
        config=config.model_dump(mode="json"),
        quick_test=quick_test,
        name=name,
        labels=labels or {},
        priority=priority,
    )
    with write_transaction(engine) as session:
        if max_queued_jobs is not None and _count_queued(session) >= max_queued_jobs:
            raise QueueFullError(f"{max_queued_jobs} jobs wait already; try again later")
        job.created_at = database_now(session)
        session.add(job)
        session.flush()
        _add_event(session, job, kind="queued", message=f"option {option} queued")
    return job


def claim(
    engine: Engine, *, worker_id: str, lease_seconds: float, job_id: str | None = None
) -> Job | None:
    """Give the most urgent queued job, then the oldest, to this worker; None if none waits.

    With `job_id` only that job is taken.
    """
    waiting = select(Job).where(Job.status == JobStatus.queued)
    if job_id is not None:
        waiting = waiting.where(Job.id == job_id)
    waiting = waiting.order_by(col(Job.priority).desc(), col(Job.created_at), col(Job.id)).limit(1)
    # A plain look first: idle workers shall not take SQLite's write lock at every poll.
    with Session(engine) as session:
        if session.exec(waiting).first() is None:
            return None
    with write_transaction(engine) as session:
        job = session.exec(waiting.with_for_update(skip_locked=True)).first()
        if job is None:
            return None
        now = database_now(session)
        job.status = JobStatus.running
        job.phase = JobPhase.loading_data
        job.attempt += 1
        job.worker_id = worker_id
        job.lease_expires_at = now + timedelta(seconds=lease_seconds)
        job.started_at = job.started_at or now
        _add_event(
            session,
            job,
            kind="running",
            message=f"attempt {job.attempt} started by worker {worker_id}",
        )
    return job


def heartbeat(engine: Engine, lease: Lease, *, lease_seconds: float, progress: float) -> None:
    """Renew the lease. Raises LeaseLostError."""
    with write_transaction(engine) as session:
        job = _leased_job(session, lease)
        now = database_now(session)
        job.lease_expires_at = now + timedelta(seconds=lease_seconds)
        job.progress = progress
        _touch_worker(session, lease.worker_id, job_id=lease.job_id)


def is_cancel_requested(engine: Engine, lease: Lease) -> bool:
    """Whether somebody asked this running job to stop. Raises LeaseLostError."""
    held = select(Job.cancel_requested_at).where(*_fence(lease))
    with Session(engine) as session:
        row = session.exec(held).all()
    if not row:
        raise LeaseLostError(f"job {lease.job_id} was taken from worker {lease.worker_id}")
    return row[0] is not None


def set_phase(engine: Engine, lease: Lease, phase: JobPhase, **values: Any) -> None:
    """Say what the worker is busy with, and set other facts that are known by then
    (`device`, `dataset_summary`). Raises LeaseLostError."""
    with write_transaction(engine) as session:
        job = _leased_job(session, lease)
        job.phase = phase
        for name, value in values.items():
            setattr(job, name, value)


def record_epoch(
    engine: Engine,
    lease: Lease,
    metrics: EpochMetrics,
    *,
    artifacts: list[Artifact],
    is_best: bool,
    progress: float,
) -> list[str]:
    """Store an epoch with its files in one transaction. Raises LeaseLostError.

    An epoch that an earlier attempt recorded is replaced. Returns the names of checkpoint
    files that no row names any more: superseded bests off the job's schedule.
    """
    with write_transaction(engine) as session:
        job = _leased_job(session, lease)
        session.merge(metrics)
        superseded = _supersede_best(session, job, epoch=metrics.epoch) if is_best else []
        for artifact in artifacts:
            session.exec(
                delete(Artifact).where(
                    col(Artifact.job_id) == job.id,
                    col(Artifact.kind) == artifact.kind,
                    col(Artifact.epoch) == artifact.epoch,
                )
            )
            session.add(artifact)
        if is_best:
            job.best_epoch = metrics.epoch
            job.best_val_recon_loss = metrics.val_recon_loss
        job.epochs_completed = metrics.epoch
        job.progress = progress
        job.train_loss = metrics.train_loss
        job.train_pixel_accuracy = metrics.train_pixel_accuracy
        job.val_foreground_recall = metrics.val_foreground_recall
        job.val_foreground_iou = metrics.val_foreground_iou
        _add_event(
            session,
            job,
            kind="epoch",
            message=f"epoch {metrics.epoch}: loss {metrics.train_loss:.5f}, "
            f"accuracy {metrics.train_pixel_accuracy:.4f}",
        )
    return superseded


def add_event(engine: Engine, lease: Lease, *, kind: str, message: str) -> None:
    """Note something about a running job. Raises LeaseLostError."""
    with write_transaction(engine) as session:
        _add_event(session, _leased_job(session, lease), kind=kind, message=message)


def finish(engine: Engine, lease: Lease, *, test_metrics: dict[str, Any]) -> None:
    """End a job whose planned epochs all ran. Raises LeaseLostError."""
    with write_transaction(engine) as session:
        job = _leased_job(session, lease)
        job.test_metrics = test_metrics
        job.progress = 1.0
        _end(session, job, JobStatus.succeeded, message=f"all {job.epochs_completed} epochs ran")


def fail(engine: Engine, lease: Lease, *, code: str, message: str, kind: FailureKind) -> None:
    """End a job by an error. Raises LeaseLostError."""
    with write_transaction(engine) as session:
        job = _leased_job(session, lease)
        _fail(session, job, code=code, message=message, kind=kind)


def acknowledge_cancel(engine: Engine, lease: Lease) -> None:
    """End a running job that was asked to stop. Raises LeaseLostError."""
    with write_transaction(engine) as session:
        job = _leased_job(session, lease)
        _end(session, job, JobStatus.cancelled, message="cancelled on request")


def hand_back(engine: Engine, lease: Lease, *, reason: str) -> None:
    """Return a running job to the queue, for any worker to go on. Raises LeaseLostError.

    This does not count as a lost attempt: its worker was told to stop.
    """
    with write_transaction(engine) as session:
        _requeue(session, _leased_job(session, lease), reason=reason)


def requeue_lost_jobs(engine: Engine, *, max_attempts: int) -> int:
    """Take running jobs whose lease ran out from their workers; any worker may call this.

    After `max_attempts` losses a job fails as `infrastructure`. Returns how many were lost.
    """
    with Session(engine) as session:
        expired = select(Job).where(
            Job.status == JobStatus.running,
            col(Job.lease_expires_at) < database_now(session),
        )
        if session.exec(expired).first() is None:
            return 0
    with write_transaction(engine) as session:
        jobs = session.exec(expired.with_for_update(skip_locked=True)).all()
        for job in jobs:
            job.num_lost_attempts += 1
            reason = f"worker {job.worker_id} gave no sign of life"
            if job.cancel_requested_at is not None:
                _end(session, job, JobStatus.cancelled, message=f"cancelled on request; {reason}")
            elif job.num_lost_attempts >= max_attempts:
                _fail(
                    session,
                    job,
                    code="worker_lost",
                    message=f"{reason}, for the {job.num_lost_attempts}. time",
                    kind=FailureKind.infrastructure,
                )
            else:
                _requeue(session, job, reason=reason)
    return len(jobs)


def cancel(engine: Engine, job_id: str) -> Job:
    """Ask a job to stop: a queued one at once, a running one at its next step.

    A second request changes nothing. Raises JobStateError if the job ended otherwise.
    """
    with write_transaction(engine) as session:
        job = _locked_job(session, job_id)
        now = database_now(session)
        if job.status in (JobStatus.queued, JobStatus.paused):
            _end(session, job, JobStatus.cancelled, message="cancelled on request")
        elif job.status == JobStatus.running and job.cancel_requested_at is None:
            job.cancel_requested_at = now
            if job.lease_expires_at is not None and job.lease_expires_at < now:
                _end(session, job, JobStatus.cancelled, message="cancelled; its worker is gone")
            else:
                _add_event(session, job, kind="cancel_requested", message="cancel requested")
        elif job.status in (JobStatus.succeeded, JobStatus.failed):
            raise JobStateError(f"job {job.id} has {job.status}; only a live job can be cancelled")
    return job


def remove(engine: Engine, job_id: str) -> None:
    """Delete a job with its rows; its files are the caller's. Raises JobStateError."""
    with write_transaction(engine) as session:
        job = _locked_job(session, job_id)
        if not job.status.is_terminal:
            raise JobStateError(f"job {job.id} is {job.status}; cancel it before deleting it")
        session.delete(job)


def register_worker(engine: Engine, worker: Worker) -> None:
    with write_transaction(engine) as session:
        worker.started_at = worker.heartbeat_at = database_now(session)
        session.add(worker)


def report_idle(engine: Engine, worker_id: str, *, state: str = "idle") -> None:
    """An idle worker's sign of life; `stopped` is its last."""
    with write_transaction(engine) as session:
        _touch_worker(session, worker_id, job_id=None, state=state)


def _count_queued(session: Session) -> int:
    return session.exec(
        select(func.count()).select_from(Job).where(Job.status == JobStatus.queued)
    ).one()


def _fence(lease: Lease) -> tuple[Any, ...]:
    return (
        Job.id == lease.job_id,
        Job.attempt == lease.attempt,
        Job.worker_id == lease.worker_id,
        Job.status == JobStatus.running,
    )


def _leased_job(session: Session, lease: Lease) -> Job:
    """The job, locked until the transaction ends, if the lease still holds."""
    job = session.exec(select(Job).where(*_fence(lease)).with_for_update()).first()
    if job is None:
        raise LeaseLostError(f"job {lease.job_id} was taken from worker {lease.worker_id}")
    return job


def _locked_job(session: Session, job_id: str) -> Job:
    job = session.exec(select(Job).where(Job.id == job_id).with_for_update()).first()
    if job is None:
        raise JobStateError(f"job {job_id} is gone")
    return job


def _requeue(session: Session, job: Job, *, reason: str) -> None:
    job.status = JobStatus.queued
    job.phase = job.worker_id = job.lease_expires_at = None
    _add_event(session, job, kind="queued", message=f"requeued: {reason}")


def _fail(session: Session, job: Job, *, code: str, message: str, kind: FailureKind) -> None:
    job.error_code = code
    job.error_message = message
    job.failure_kind = kind
    _end(session, job, JobStatus.failed, message=message)


def _end(session: Session, job: Job, status: JobStatus, *, message: str) -> None:
    assert not JobStatus(job.status).is_terminal
    job.status = status
    job.phase = job.lease_expires_at = None
    job.ended_at = database_now(session)
    _add_event(session, job, kind=status, message=message)


def _supersede_best(session: Session, job: Job, *, epoch: int) -> list[str]:
    """Drop the row of the best checkpoint so far, unless the schedule keeps it."""
    config = job.training_config
    if job.best_epoch in (None, epoch) or job.best_epoch % config.checkpoint_every == 0:
        return []
    rows = session.exec(
        select(Artifact).where(
            Artifact.job_id == job.id,
            Artifact.kind == "checkpoint",
            Artifact.epoch == job.best_epoch,
        )
    ).all()
    for row in rows:
        session.delete(row)
    return [row.file_name for row in rows]


def _touch_worker(
    session: Session, worker_id: str, *, job_id: str | None, state: str = "busy"
) -> None:
    worker = session.get(Worker, worker_id)
    if worker is not None:
        worker.heartbeat_at = database_now(session)
        worker.job_id = job_id
        worker.state = state


def _add_event(session: Session, job: Job, *, kind: str, message: str) -> None:
    session.add(
        JobEvent(job_id=job.id, kind=kind, message=message, created_at=database_now(session))
    )
