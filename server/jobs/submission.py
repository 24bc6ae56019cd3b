"""Submitting a job: the job's row and its labels."""

from datetime import timedelta

from sqlmodel import Session

from server.database.engine import database_now
from server.jobs.admission import Admission
from server.jobs.queue import enqueue
from server.models.configuration import TrainingConfig, compute_config_sha256
from server.models.tables import Job, JobLabel


def new_job(
    config: TrainingConfig,
    *,
    option: str,
    dataset_sha256: str | None = None,
    quick_test: bool = False,
    name: str | None = None,
    labels: dict[str, str] | None = None,
    priority: int = 0,
) -> Job:
    """A new job, not stored yet. An uploaded data set is a part of its identity."""
    return Job(
        option=str(option),
        config=config.model_dump(mode="json"),
        config_sha256=compute_config_sha256(config, dataset_sha256=dataset_sha256),
        quick_test=quick_test,
        name=name,
        labels=labels or {},
        priority=priority,
    )


def submit_job(
    session: Session,
    job: Job,
    *,
    admission: Admission | None = None,
    reserved_seconds: float = 0.0,
) -> Job:
    """Queue a new job in the caller's transaction; the job is accepted once this has committed.

    For `reserved_seconds`, only a worker that names this job can claim it. Raises what `admission`
    raises.
    """
    if admission is not None:
        admission.check(session, num_jobs=1, datasets=[job.config["dataset"]])
        job.queued_by, job.client = admission.queued_by, admission.client
    job.created_at = database_now(session)
    session.add(job)
    session.flush()
    session.add_all(
        JobLabel(job_id=job.id, key=key, value=value, created_at=job.created_at)
        for key, value in job.labels.items()
    )
    reserved_until = job.created_at + timedelta(seconds=reserved_seconds)
    enqueue(
        session,
        job,
        message=f"option {job.option} queued",
        available_at=reserved_until if reserved_seconds else None,
    )
    return job
