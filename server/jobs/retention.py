"""Retention: deletes files when space is needed. First data that can be generated again, then the
oldest checkpoints that no resume needs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, func
from sqlmodel import Session, col, select

from server.database.engine import take_turn, write_transaction
from server.errors import StorageFullError
from server.files.artifacts import JobFiles
from server.files.datasets import NEW_SUFFIX, UPLOAD_SUFFIX
from server.models.tables import TERMINAL_STATUSES, Artifact, ArtifactKind, Job
from server.settings import Settings

#: Of files that are being written.
_INCOMPLETE: Final = (UPLOAD_SUFFIX, NEW_SUFFIX, ".tmp")

_logger = logging.getLogger(__name__)


def free_space(engine: Engine, settings: Settings, *, num_bytes: int = 0) -> int:
    """Remove generated data, then checkpoints, oldest first, until `num_bytes` more would be within
    `max_storage_bytes`.

    Pictures stay, and all files of jobs that are pinned or have not ended. Of other jobs, the best
    checkpoints by loss and by likelihood and the newest one stay, since a resume needs them.
    Returns the number of removed checkpoints.
    """
    num_removed = 0
    excess = measure_storage(engine, settings) + num_bytes - settings.max_storage_bytes
    excess -= _remove_generated(settings.cache_dir, num_bytes=excess)
    for artifact in _list_removable(engine) if excess > 0 else []:
        if excess <= 0:
            break
        if _remove(engine, artifact, settings=settings):
            num_removed += 1
            excess -= artifact.size_bytes
    if excess > 0:
        _logger.warning("%d bytes more than allowed are in use, and nothing can be removed", excess)
    return num_removed


def ensure_space(engine: Engine, settings: Settings) -> int:
    """Free space for an upload whose size is not known yet, and return the bytes that stay in use,
    which are 0 without a limit. Raises StorageFullError if nothing can be freed."""
    limit = settings.max_storage_bytes
    if not limit:
        return 0
    if (in_use := measure_storage(engine, settings)) < limit:
        return in_use
    free_space(engine, settings, num_bytes=1)
    if (in_use := measure_storage(engine, settings)) >= limit:
        raise StorageFullError(describe_full(settings))
    return in_use


@contextmanager
def reserve_space(engine: Engine, settings: Settings, *, num_bytes: int) -> Iterator[None]:
    """While entered, so many bytes more are within the limit, and no server stores another upload.

    Raises StorageFullError if they do not fit and nothing can be freed.
    """
    limit = settings.max_storage_bytes
    if not limit:
        yield
        return
    if measure_storage(engine, settings) + num_bytes > limit:
        free_space(engine, settings, num_bytes=num_bytes)
    with write_transaction(engine) as session:
        take_turn(session)
        # Another upload, or a checkpoint, may have come first.
        if _measure_all(session, settings) + num_bytes > limit:
            raise StorageFullError(describe_full(settings))
        yield


def describe_full(settings: Settings) -> str:
    """Why an upload cannot be stored."""
    return (
        f"the {settings.max_storage_bytes} bytes that may be stored (LOSSLAB_MAX_STORAGE_BYTES) "
        "are in use, or would be; delete jobs or data sets first"
    )


def measure_storage(engine: Engine, settings: Settings) -> int:
    """Bytes of all checkpoints, pictures and data sets, and of generated data in the cache.

    Files that are not complete do not count: a killed process may have left them.
    """
    with Session(engine) as session:
        return _measure_all(session, settings)


def _measure_all(session: Session, settings: Settings) -> int:
    artifacts = session.exec(select(func.coalesce(func.sum(Artifact.size_bytes), 0))).one()
    folders = (settings.datasets_dir, settings.cache_dir)
    paths = (path for folder in folders for path in folder.glob("*"))
    return artifacts + sum(_measure(path) for path in paths if path.suffix not in _INCOMPLETE)


def _remove_generated(cache_dir: Path, *, num_bytes: int) -> int:
    """Remove files until `num_bytes` are freed or none is left; returns the bytes removed.

    A job that reads such a file keeps it open, so that removing it does no harm.
    """
    removed = 0
    for path in cache_dir.glob("*.npy"):
        if removed >= num_bytes:
            break
        removed += _measure(path)
        path.unlink(missing_ok=True)
    return removed


def _measure(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # the temporary file of an upload that has just ended
        return 0


def _list_removable(engine: Engine) -> list[Artifact]:
    newest = (
        select(Artifact.job_id, func.max(Artifact.epoch).label("epoch"))
        .where(Artifact.kind == ArtifactKind.checkpoint)
        .group_by(col(Artifact.job_id))
        .subquery()
    )
    removable = (
        select(Artifact)
        .join(Job, col(Job.id) == Artifact.job_id)
        .join(newest, newest.c.job_id == Artifact.job_id)
        .where(
            Artifact.kind == ArtifactKind.checkpoint,
            col(Job.status).in_(TERMINAL_STATUSES),
            col(Job.is_pinned).is_(False),
            Artifact.epoch != func.coalesce(Job.best_epoch, 0),
            Artifact.epoch != func.coalesce(Job.best_likelihood_epoch, 0),
            Artifact.epoch != newest.c.epoch,
        )
        .order_by(col(Artifact.created_at), col(Artifact.id))
    )
    with Session(engine) as session:
        return list(session.exec(removable))


def _remove(engine: Engine, artifact: Artifact, *, settings: Settings) -> bool:
    """Remove a row, then its file, unless the job was resumed or pinned meanwhile."""
    with write_transaction(engine) as session:
        job = session.get(Job, artifact.job_id, with_for_update=True)
        row = session.get(Artifact, artifact.id)
        if job is None or row is None or job.is_pinned or not job.status.is_terminal:
            return False
        files = JobFiles(settings.runs_dir, artifact.job_id)
        identity = files.identify(row.file_name)
        session.delete(row)
    _logger.info("%s of job %s was removed to free space", artifact.file_name, artifact.job_id)
    files.remove(artifact.file_name, identity)
    return True
