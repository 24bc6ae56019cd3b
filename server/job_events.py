"""The events of a job: what happened to it, in words for people and figures for programs."""

from typing import Any

from sqlmodel import Session

from server.database import database_now
from server.models import Artifact, EpochMetrics, EventKind, Job, JobEvent


def add_event(
    session: Session,
    job: Job,
    kind: EventKind,
    *,
    message: str,
    data: dict[str, Any] | None = None,
) -> None:
    """Note something in a transaction that holds the job's row, so that ids rise with time."""
    now = database_now(session)
    session.add(JobEvent(job_id=job.id, kind=kind, message=message, data=data, created_at=now))
    session.flush()


def add_epoch_event(session: Session, job: Job, metrics: EpochMetrics) -> None:
    figures = metrics.model_dump(mode="json", exclude={"job_id", "attempt", "recorded_at"})
    message = (
        f"epoch {metrics.epoch}: loss {metrics.train_loss:.5f}, "
        f"accuracy {metrics.train_pixel_accuracy:.4f}"
    )
    add_event(session, job, EventKind.epoch, message=message, data=figures)


def add_artifact_event(session: Session, job: Job, artifact: Artifact) -> None:
    message = f"{artifact.kind} of epoch {artifact.epoch} saved as {artifact.file_name}"
    data = {"kind": artifact.kind, "epoch": artifact.epoch, "file_name": artifact.file_name}
    add_event(session, job, EventKind(artifact.kind), message=message, data=data)
