"""Orphans: files of killed processes that no row names and that no later attempt removes.

An attempt removes what the attempts before it have left. Nothing follows the last attempt of a job,
an upload, or a worker that wrote generated data.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.files.artifacts import JobFiles, list_job_ids
from server.files.datasets import NEW_SUFFIX, UPLOAD_SUFFIX
from server.files.filesystem import FileIdentity, identify, is_held, remove_if_unchanged
from server.jobs.records import list_resume_point
from server.models.tables import Artifact, Job, JobStatus
from server.settings import Settings

#: A younger file may belong to a process that lives, unless its mark says otherwise.
MIN_AGE_SECONDS: Final = 3600.0
_BATCH_SIZE: Final = 200

_logger = logging.getLogger(__name__)

Orphans = dict[Path, FileIdentity]


class OrphanSweep:
    """Removes the orphans that nobody writes any more.

    A file that is marked while it is written tells whether it is. An upload is marked before it has
    its suffix, so that it is removed at once; generated data must be old. Any other one must be
    found twice, each time old and unchanged. Once would not be enough: the clock may just have been
    set ahead, which makes all files old.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._seen: Orphans = {}

    def run(self) -> int:
        """Look for orphans; returns how many were removed. Call this at the start of a server, and
        every half hour."""
        found, left = dict(self._find_of_all_jobs()), {}
        for path, identity in self._find_marked():
            match _is_held(path):
                case False:
                    left[path] = identity
                case None if _is_old(identity):
                    found[path] = identity
        left |= {path: each for path, each in found.items() if self._seen.get(path) == each}
        self._seen = {path: found[path] for path in found.keys() - left.keys()}
        num_removed = 0
        for path, identity in left.items():
            try:
                num_removed += remove_if_unchanged(path, identity)
            except OSError as error:
                _logger.warning("%s, which nothing names, cannot be removed: %s", path, error)
        if num_removed:
            _logger.info("%d files of killed processes were removed", num_removed)
        return num_removed

    def _find_of_all_jobs(self) -> Iterator[tuple[Path, FileIdentity]]:
        job_ids = list_job_ids(self._settings.runs_dir)
        for first in range(0, len(job_ids), _BATCH_SIZE):
            yield from self._find_of_jobs(job_ids[first : first + _BATCH_SIZE])

    def _find_marked(self) -> Iterator[tuple[Path, FileIdentity]]:
        """Those that are marked while they are written."""
        yield from _find(self._settings.datasets_dir, f".*{UPLOAD_SUFFIX}")
        yield from _find_old(self._settings.datasets_dir, f".*{NEW_SUFFIX}")
        yield from _find_old(self._settings.cache_dir, "*.tmp")

    def _find_of_jobs(self, job_ids: list[str]) -> Iterator[tuple[Path, FileIdentity]]:
        """The orphans of jobs that no worker has or will have by itself.

        Folders without a job are left alone: the database may be another one's, or a backup's.
        """
        listed = {job_id: JobFiles(self._settings.runs_dir, job_id) for job_id in job_ids}
        # Before the names are read, so that a file and its row cannot come in between.
        found = {job_id: files.list_found() for job_id, files in listed.items()}
        has_attempt = (JobStatus.queued, JobStatus.running)
        jobs = select(Job).where(col(Job.id).in_(job_ids), col(Job.status).not_in(has_attempt))
        with Session(self._engine) as session:
            named = {job.id: list_resume_point(job) for job in session.exec(jobs)}
            names = select(Artifact.job_id, Artifact.file_name).where(
                col(Artifact.job_id).in_(named)
            )
            for job_id, name in session.exec(names):
                named[job_id].add(name)
        for job_id in named:
            for name in found[job_id].keys() - named[job_id]:
                if _is_old(found[job_id][name]):
                    yield listed[job_id].checkpoints_dir / name, found[job_id][name]


def _find_old(folder: Path, pattern: str) -> Iterator[tuple[Path, FileIdentity]]:
    return (each for each in _find(folder, pattern) if _is_old(each[1]))


def _find(folder: Path, pattern: str) -> Iterator[tuple[Path, FileIdentity]]:
    for path in folder.glob(pattern):
        try:
            yield path, identify(path)
        except FileNotFoundError:
            continue


def _is_held(path: Path) -> bool | None:
    """Whether a process is writing the file, or has just removed it; None if that is not known."""
    try:
        return is_held(path)
    except FileNotFoundError:
        return True


def _is_old(identity: FileIdentity) -> bool:
    return time.time() - identity.modified_at_ns / 1e9 > MIN_AGE_SECONDS
