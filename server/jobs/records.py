"""Records of an attempt in the database: phases, epochs with their files, resume points, notes.

All writes need the lease and raise LeaseLostError without it. Reads do not need it.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

from sqlalchemy import Engine, and_
from sqlmodel import Session, col, delete, select

from server.database.engine import database_now
from server.errors import NotFoundError
from server.files.artifacts import JobFiles
from server.finite import find_not_finite
from server.jobs.events import add_artifact_event, add_epoch_event, add_event
from server.jobs.leases import Lease, holding
from server.models.epochs import EpochMetrics
from server.models.provenance import Provenance
from server.models.tables import (
    Artifact,
    ArtifactKind,
    BestBy,
    EventKind,
    Job,
    JobPhase,
    ResumePoint,
)
from server.texts import list_some

_MAX_QUOTED: Final = 50
_SUMMARY = ("train_loss", "train_pixel_accuracy", "val_foreground_recall", "val_foreground_iou")


def set_phase(engine: Engine, lease: Lease, phase: JobPhase) -> None:
    """Set the phase of the running job."""
    with holding(engine, lease) as (_, job):
        job.phase = phase


def record_start(
    engine: Engine,
    lease: Lease,
    *,
    device: str,
    progress: float,
    dataset_summary: dict[str, Any],
    provenance: Provenance,
    warnings: Sequence[str],
) -> None:
    """Record that training begins: on which device, with which data, at which progress, by what,
    and what the user should know of the data."""
    with holding(engine, lease) as (session, job):
        job.phase = JobPhase.training
        # The progress may be lower than before, if a checkpoint could not be loaded. Setting its
        # time keeps the job from being shown as stalled until it catches up.
        job.progress, job.progress_at = progress, database_now(session)
        job.device, job.dataset_summary = device, dataset_summary
        change = _describe_change(job, provenance) if progress else None
        job.provenance = provenance.model_dump()
        for message in [*warnings, *filter(None, [change])]:
            add_event(session, job, EventKind.warning, message=message)


def _describe_change(job: Job, provenance: Provenance) -> str | None:
    """What is new in an attempt that goes on with the work of an earlier one."""
    if job.provenance is None:
        return None
    return provenance.describe_change(Provenance.model_validate(job.provenance))


def record_epoch(
    engine: Engine,
    lease: Lease,
    metrics: EpochMetrics,
    *,
    publish: Callable[[], list[Artifact]],
    resume_point: ResumePoint | None,
    best_by: Collection[BestBy],
    progress: float,
) -> None:
    """Store an epoch with its files in one transaction; `best_by` says by what it is the best.

    `publish` renames the files to their final names and returns their rows. It is called while
    the lease is held, so that a worker that lost its lease cannot overwrite another worker's
    files. An epoch of an earlier attempt is replaced. An epoch that this attempt has already
    recorded (the commit succeeded, but its confirmation was lost) is not changed.
    """
    with holding(engine, lease) as (session, job):
        stored = session.get(EpochMetrics, (job.id, metrics.epoch))
        if stored is not None and stored.attempt == lease.attempt:
            return
        session.merge(metrics)
        for by in best_by:
            _supersede_best(session, job, by=by, metrics=metrics)
        job.resume_point = None if resume_point is None else resume_point.model_dump()
        _summarise_epoch(job, metrics, progress=progress)
        add_epoch_event(session, job, metrics)
        _warn_of_missing(session, job, metrics)
        for artifact in publish():
            _replace_artifact(session, artifact)
            add_artifact_event(session, job, artifact)


def record_artifact(
    engine: Engine, lease: Lease, artifact: Artifact, *, publish: Callable[[], None]
) -> None:
    """Record a file of an epoch that has been recorded before; `publish` gives it its name."""
    with holding(engine, lease) as (session, job):
        publish()
        _replace_artifact(session, artifact)
        add_artifact_event(session, job, artifact)


def record_resume_point(
    engine: Engine, lease: Lease, resume_point: ResumePoint, *, publish: Callable[[], None]
) -> None:
    """Record the file from which the job can go on inside an epoch."""
    with holding(engine, lease) as (session, job):
        job.resume_point = resume_point.model_dump()
        session.flush()
        publish()


def add_note(engine: Engine, lease: Lease, kind: EventKind, *, message: str) -> None:
    """Record an event of a running job."""
    with holding(engine, lease) as (session, job):
        add_event(session, job, kind, message=message)


def keep_named_files(engine: Engine, lease: Lease, *, files: JobFiles) -> None:
    """Remove the job's files that no row names, and renew those of the best epoch.

    A worker that is frozen in here, and comes back after another one has taken the job over,
    removes nothing that the other one wrote, and leaves the best epoch's files as they should be.
    """
    with holding(engine, lease) as (session, job):
        found = files.list_found()
        named, best_epoch = list_named(session, job), job.best_epoch
    files.sweep(found, named=named)
    while True:
        files.renew_best(best_epoch, named=named)
        with Session(engine) as session:
            current = session.get(Job, lease.job_id)
            if current is None or current.best_epoch == best_epoch:
                return
            named, best_epoch = list_named(session, current), current.best_epoch


def list_named(session: Session, job: Job) -> set[str]:
    """The names of the files in the job's rows."""
    names = select(Artifact.file_name).where(Artifact.job_id == job.id)
    return list_resume_point(job) | set(session.exec(names))


def list_resume_point(job: Job) -> set[str]:
    """The name of the job's resume point, if it has one."""
    return set() if job.resume_point is None else {job.resume_point["file_name"]}


def _warn_of_missing(session: Session, job: Job, metrics: EpochMetrics) -> None:
    if names := find_not_finite(metrics.model_dump()):
        message = f"epoch {metrics.epoch}: stored as null, as not finite: {', '.join(names)}"
        add_event(session, job, EventKind.warning, message=message)


def _supersede_best(session: Session, job: Job, *, by: BestBy, metrics: EpochMetrics) -> None:
    """Make this epoch the best and delete the former best checkpoint's row, unless the checkpoint
    is a scheduled one or still the best by something else."""
    before = job.best_epochs[by]
    match by:
        case BestBy.loss:
            job.best_epoch, job.best_val_recon_loss = metrics.epoch, metrics.val_recon_loss
        case BestBy.likelihood:
            job.best_likelihood_epoch = metrics.epoch
            job.best_val_log_likelihood = metrics.val_log_likelihood
    if before is None or before in job.best_epochs.values():
        return
    if before % job.training_config.checkpoint_every:
        _delete_artifact(session, job.id, kind=ArtifactKind.checkpoint, epoch=before)


def _replace_artifact(session: Session, artifact: Artifact) -> None:
    _delete_artifact(session, artifact.job_id, kind=artifact.kind, epoch=artifact.epoch)
    # A copy: if an outage interrupts the transaction, it is repeated with the same objects.
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
    # The heartbeat may already have reported steps beyond this epoch.
    job.progress = max(job.progress, progress)
    for name in _SUMMARY:
        setattr(job, name, getattr(metrics, name))


class ArtifactNotFoundError(NotFoundError):
    """A job has no such file for an epoch; the message names some epochs that have one."""


def read_artifacts(session: Session, job_id: str, *, kind: ArtifactKind) -> list[Artifact]:
    """A job's files of a kind, oldest first."""
    artifacts = select(Artifact).where(Artifact.job_id == job_id, Artifact.kind == kind)
    return list(session.exec(artifacts.order_by(col(Artifact.epoch))))


def find_artifact(
    session: Session, job: Job, *, kind: ArtifactKind, epoch: str, best_by: BestBy = BestBy.loss
) -> Artifact:
    """The file of an epoch, or of `best` or `latest`. Raises ArtifactNotFoundError."""
    artifacts = {a.epoch: a for a in read_artifacts(session, job.id, kind=kind)}
    match epoch:
        case "best":
            number = job.best_epochs[best_by]
        case "latest":
            number = max(artifacts, default=None)
        case _:
            number = int(epoch) if re.fullmatch("[0-9]{1,6}", epoch) else None
    if number not in artifacts:
        known = list_some(artifacts) or "none yet"
        missing = f"job {job.id} has no {kind} of epoch {epoch[:_MAX_QUOTED]!r}"
        raise ArtifactNotFoundError(f"{missing}; there are best, latest and {known}")
    return artifacts[number]


def list_picture_epochs(session: Session, job_ids: Iterable[str]) -> dict[str, list[int]]:
    """The epochs with a picture of each job, oldest first."""
    epochs: dict[str, list[int]] = {job_id: [] for job_id in job_ids}
    pictures = select(Artifact.job_id, Artifact.epoch).where(
        col(Artifact.job_id).in_(epochs), Artifact.kind == ArtifactKind.reconstruction
    )
    for job_id, epoch in session.exec(pictures.order_by(col(Artifact.epoch))):
        epochs[job_id].append(epoch)
    return epochs


def read_checkpoints(engine: Engine, job_id: str) -> list[Artifact]:
    """A job's checkpoints, oldest first."""
    with Session(engine) as session:
        return read_artifacts(session, job_id, kind=ArtifactKind.checkpoint)


def read_pictures(engine: Engine, job_id: str, *, kind: ArtifactKind) -> list[Artifact]:
    """A job's pictures of a kind, oldest first."""
    with Session(engine) as session:
        return read_artifacts(session, job_id, kind=kind)


def read_epoch(engine: Engine, job_id: str, *, epoch: int) -> EpochMetrics | None:
    """What is recorded of an epoch."""
    with Session(engine) as session:
        return session.get(EpochMetrics, (job_id, epoch))


def list_bests_so_far(engine: Engine, job_id: str) -> set[int]:
    """The epochs that were the best by validation reconstruction loss when they were recorded."""
    losses = select(EpochMetrics.epoch, EpochMetrics.val_recon_loss)
    of_job = losses.where(EpochMetrics.job_id == job_id).order_by(col(EpochMetrics.epoch))
    bests, lowest = set(), math.inf
    with Session(engine) as session:
        for epoch, loss in session.exec(of_job):
            if loss < lowest:
                bests.add(epoch)
                lowest = loss
    return bests


def read_checkpoints_best_first(engine: Engine, job_id: str, *, by: BestBy) -> list[Artifact]:
    """A job's checkpoints, the best first. Those of epochs without the value are left out."""
    is_of_epoch = and_(
        col(EpochMetrics.job_id) == col(Artifact.job_id),
        col(EpochMetrics.epoch) == col(Artifact.epoch),
    )
    checkpoints = (
        select(Artifact)
        .join(EpochMetrics, is_of_epoch)
        .where(Artifact.job_id == job_id, Artifact.kind == ArtifactKind.checkpoint)
    )
    recon_loss, likelihood = col(EpochMetrics.val_recon_loss), col(EpochMetrics.val_log_likelihood)
    match by:
        case BestBy.loss:
            checkpoints = checkpoints.order_by(recon_loss)
        case BestBy.likelihood:
            checkpoints = checkpoints.where(likelihood.is_not(None)).order_by(likelihood.desc())
    with Session(engine) as session:
        return list(session.exec(checkpoints.order_by(col(EpochMetrics.epoch))))
