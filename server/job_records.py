"""What an attempt leaves in the database: phases, epochs with their files, resume points, notes.

Everything is written while holding the lease and raises LeaseLostError without it.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine
from sqlmodel import Session, col, delete, select

from server.database import database_now
from server.job_events import add_artifact_event, add_epoch_event, add_event
from server.leases import Lease, holding
from server.models import (
    Artifact,
    ArtifactKind,
    EpochMetrics,
    EventKind,
    Job,
    JobPhase,
    ResumePoint,
)

_SUMMARY = ("train_loss", "train_pixel_accuracy", "val_foreground_recall", "val_foreground_iou")


def set_phase(engine: Engine, lease: Lease, phase: JobPhase) -> None:
    """Say what the worker is busy with."""
    with holding(engine, lease) as (_, job):
        job.phase = phase


def record_start(
    engine: Engine,
    lease: Lease,
    *,
    device: str,
    progress: float,
    dataset_summary: dict[str, Any],
) -> None:
    """Say that training begins, where, from which progress on, and on what."""
    with holding(engine, lease) as (session, job):
        job.phase = JobPhase.training
        # Less than before where a state could not be loaded: the job is not stalled meanwhile.
        job.progress, job.progress_at = progress, database_now(session)
        job.device, job.dataset_summary = device, dataset_summary


def record_epoch(
    engine: Engine,
    lease: Lease,
    metrics: EpochMetrics,
    *,
    publish: Callable[[], list[Artifact]],
    resume_point: ResumePoint | None,
    is_best: bool,
    progress: float,
) -> None:
    """Store an epoch with its files in one transaction.

    `publish` gives the files their names and returns the rows that shall name them. It is
    called while the lease is held, so that a worker that lost it cannot overwrite the files of
    another. An epoch that an earlier attempt recorded is replaced; one that this attempt
    recorded already, without hearing of it, is left alone.
    """
    with holding(engine, lease) as (session, job):
        stored = session.get(EpochMetrics, (job.id, metrics.epoch))
        if stored is not None and stored.attempt == lease.attempt:
            return
        session.merge(metrics)
        if is_best:
            _supersede_best(session, job, metrics=metrics)
        job.resume_point = None if resume_point is None else resume_point.model_dump()
        _summarise_epoch(job, metrics, progress=progress)
        add_epoch_event(session, job, metrics)
        for artifact in publish():
            _replace_artifact(session, artifact)
            add_artifact_event(session, job, artifact)


def record_resume_point(
    engine: Engine, lease: Lease, resume_point: ResumePoint, *, publish: Callable[[], None]
) -> None:
    """Name the file from which the job can go on inside an epoch."""
    with holding(engine, lease) as (session, job):
        job.resume_point = resume_point.model_dump()
        session.flush()
        publish()


def add_note(engine: Engine, lease: Lease, kind: EventKind, *, message: str) -> None:
    """Note something about a running job."""
    with holding(engine, lease) as (session, job):
        add_event(session, job, kind, message=message)


def keep_named_files(
    engine: Engine, lease: Lease, *, sweep: Callable[[set[str], int | None], None]
) -> None:
    """Call `sweep` with the file names that rows name and the best epoch, lease in hand."""
    with holding(engine, lease) as (session, job):
        names = select(Artifact.file_name).where(Artifact.job_id == job.id)
        named = set(session.exec(names))
        if job.resume_point is not None:
            named.add(job.resume_point["file_name"])
        sweep(named, job.best_epoch)


def _supersede_best(session: Session, job: Job, *, metrics: EpochMetrics) -> None:
    """Make this epoch the best; the checkpoint that was goes, unless the schedule keeps it."""
    config, before = job.training_config, job.best_epoch
    job.best_epoch, job.best_val_recon_loss = metrics.epoch, metrics.val_recon_loss
    if before is not None and before != metrics.epoch and before % config.checkpoint_every:
        _delete_artifact(session, job.id, kind=ArtifactKind.checkpoint, epoch=before)


def _replace_artifact(session: Session, artifact: Artifact) -> None:
    _delete_artifact(session, artifact.job_id, kind=artifact.kind, epoch=artifact.epoch)
    # A copy: the change may have to be made again, after an outage in its midst.
    session.add(Artifact(**artifact.model_dump(exclude={"id"})))


def _delete_artifact(session: Session, job_id: str, *, kind: ArtifactKind, epoch: int) -> None:
    session.exec(
        delete(Artifact).where(
            col(Artifact.job_id) == job_id,
            col(Artifact.kind) == kind,
            col(Artifact.epoch) == epoch,
        )
    )


def _summarise_epoch(job: Job, metrics: EpochMetrics, *, progress: float) -> None:
    job.epochs_completed = metrics.epoch
    # The heartbeat may have told of steps beyond this epoch already.
    job.progress = max(job.progress, progress)
    for name in _SUMMARY:
        setattr(job, name, getattr(metrics, name))
