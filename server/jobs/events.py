"""Events of a job, each with a message for people and values for programs."""

from typing import Any

from sqlmodel import Session, col, select

from server.database.engine import database_now
from server.messages import redact
from server.models.epochs import EpochMetrics
from server.models.tables import Artifact, ArtifactKind, EventKind, Job, JobEvent


def add_event(
    session: Session,
    job: Job,
    kind: EventKind | ArtifactKind,
    *,
    message: str,
    data: dict[str, Any] | None = None,
) -> None:
    """Record an event, without secrets. The caller must have locked the job's row, so that ids rise
    with time."""
    now, message = database_now(session), redact(message)
    session.add(JobEvent(job_id=job.id, kind=kind, message=message, data=data, created_at=now))
    session.flush()


def add_epoch_event(session: Session, job: Job, metrics: EpochMetrics) -> None:
    values = metrics.model_dump(mode="json", exclude={"job_id", "attempt", "recorded_at"})
    message = (
        f"epoch {metrics.epoch}: loss {metrics.train_loss:.5f}, "
        f"accuracy {metrics.train_pixel_accuracy:.4f}"
    )
    add_event(session, job, EventKind.epoch, message=message, data=values)


def add_artifact_event(session: Session, job: Job, artifact: Artifact) -> None:
    message = f"{artifact.kind} of epoch {artifact.epoch} saved as {artifact.file_name}"
    data = {"kind": artifact.kind, "epoch": artifact.epoch, "file_name": artifact.file_name}
    add_event(session, job, artifact.kind, message=message, data=data)


def read_events(session: Session, job_id: str, *, after: int, limit: int) -> list[JobEvent]:
    """A job's events after id `after`, oldest first."""
    rows = select(JobEvent).where(JobEvent.job_id == job_id, col(JobEvent.id) > after)
    return list(session.exec(rows.order_by(col(JobEvent.id)).limit(limit)))


def read_newest_events(session: Session, job_id: str, *, limit: int) -> list[JobEvent]:
    """A job's newest events, newest first."""
    rows = select(JobEvent).where(JobEvent.job_id == job_id)
    return list(session.exec(rows.order_by(col(JobEvent.id).desc()).limit(limit)))
