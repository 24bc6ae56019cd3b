"""Studies: arms times seeds, found, counted, and stopped together; `server.jobs.seeds` queues them.

What a study answers is computed from its jobs in `server.judging.studies`; only its plan is
stored, and how far it was carried out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, select, tuple_, update
from sqlmodel import Session, col

from server.database.engine import database_now
from server.errors import ConflictError, NotFoundError
from server.jobs.admission import Admission
from server.jobs.answers import forget_study
from server.jobs.batches import (
    LockedJob,
    cancel_all,
    lock_jobs,
    pause_all,
    remove_all,
    resume_all,
)
from server.models.studies import Study, StudyJob
from server.models.tables import TERMINAL_STATUSES, Job, JobStatus, is_judged

MAX_ARMS: Final = 20
MAX_SEEDS: Final = 100  # so that a study has at most 2,000 jobs
#: Enough for few transactions, and few enough that none locks SQLite for long.
_NUM_DELETED_AT_ONCE: Final = 100

Counts = Mapping[JobStatus, int]
#: What a person may ask of a study; it returns the study.
Command = Callable[[Session, str], Study]

_UNFINISHED: Final = (
    select(col(StudyJob.study_id))
    .join(Job, col(Job.id) == col(StudyJob.job_id))
    .where(col(StudyJob.study_id) == col(Study.id), col(Job.status).not_in(TERMINAL_STATUSES))
)
_ARE_DUE: Final = (
    col(Study.until_decided).is_(True),
    col(Study.decided_at).is_(None),
    col(Study.cancel_requested_at).is_(None),
    col(Study.pause_requested_at).is_(None),
    ~_UNFINISHED.exists(),
)


class StudyNotFoundError(NotFoundError):
    """No study has this id."""

    def __init__(self, study_id: str) -> None:
        super().__init__(f"there is no study {study_id!r}; GET /studies lists all studies")


class StudyStateError(ConflictError):
    """The study's state does not allow the request."""


@dataclass(frozen=True, slots=True)
class JobCounts:
    """The jobs of a study: how many, of each status, and their mean progress."""

    num_jobs: int  #: also those that were deleted
    by_status: Counts
    progress: float


@dataclass(frozen=True, slots=True)
class StudyEntry:
    """A study in a list, with what its jobs do."""

    study: Study
    counts: JobCounts

    @property
    def status(self) -> JobStatus:
        return derive_status(self.study, self.counts.by_status)


def find_study(session: Session, study_id: str) -> Study:
    """Raises StudyNotFoundError."""
    study = _find(session, study_id, is_locked=False)
    if study is None:
        raise StudyNotFoundError(study_id)
    return study


def read_studies(session: Session, *, after: Study | None, limit: int) -> list[StudyEntry]:
    """The newest studies, or the newest that are older than the study `after`."""
    newest = select(Study).order_by(col(Study.created_at).desc(), col(Study.id).desc())
    if after is not None:
        place = (after.created_at, after.id)
        newest = newest.where(_place() < place)
    studies = list(session.scalars(newest.limit(limit)))
    counts = count_jobs(session, [study.id for study in studies])
    return [StudyEntry(study, counts[study.id]) for study in studies]


def count_jobs(session: Session, study_ids: Sequence[str]) -> dict[str, JobCounts]:
    """What the jobs of each study do, in one query."""
    by_status: dict[str, dict[JobStatus, int]] = {study_id: {} for study_id in study_ids}
    total, done = dict.fromkeys(study_ids, 0), dict.fromkeys(study_ids, 0.0)
    rows = (
        select(col(StudyJob.study_id), col(Job.status), func.count(), func.sum(col(Job.progress)))
        .outerjoin(Job, col(Job.id) == col(StudyJob.job_id))
        .where(col(StudyJob.study_id).in_(study_ids))
        .group_by(col(StudyJob.study_id), col(Job.status))
    )
    for study_id, status, num_jobs, progress in session.execute(rows):
        if status is not None:  # it is None for jobs that were deleted
            by_status[study_id][status] = num_jobs
        total[study_id] += num_jobs
        # What has ended makes no further progress.
        has_ended = status is None or status in TERMINAL_STATUSES
        done[study_id] += num_jobs if has_ended else progress
    return {
        study_id: JobCounts(num_jobs, by_status[study_id], done[study_id] / (num_jobs or 1))
        for study_id, num_jobs in total.items()
    }


def derive_status(study: Study, counts: Counts) -> JobStatus:
    """The status of a study, in the words of its jobs.

    A race without jobs to run is running: its next look is being queued.
    """
    is_open = is_racing(study)
    if counts.get(JobStatus.running):
        return JobStatus.running
    if counts.get(JobStatus.queued):
        has_begun = counts.get(JobStatus.succeeded) or counts.get(JobStatus.failed)
        return JobStatus.running if has_begun else JobStatus.queued
    if counts.get(JobStatus.paused) or (is_open and study.pause_requested_at is not None):
        return JobStatus.paused
    if is_open:
        return JobStatus.running
    if study.cancel_requested_at is not None and counts.get(JobStatus.cancelled):
        return JobStatus.cancelled
    for status in (JobStatus.succeeded, JobStatus.failed):
        if counts.get(status):
            return status
    return JobStatus.cancelled


def is_racing(study: Study) -> bool:
    """Whether further looks are queued by themselves."""
    is_over = study.decided_at is not None or study.cancel_requested_at is not None
    return study.until_decided and not is_over


def read_races(session: Session) -> list[Study]:
    """The races that go on, also those that are paused."""
    races = select(Study).where(col(Study.until_decided).is_(True), col(Study.decided_at).is_(None))
    return [study for study in session.scalars(races) if is_racing(study)]


def list_due_races(session: Session) -> list[str]:
    """The races whose jobs have all ended, so that a look is due."""
    return list(session.scalars(select(col(Study.id)).where(*_ARE_DUE)))


def is_due(session: Session, study: Study) -> bool:
    """Whether the study is a race whose jobs have all ended."""
    due = select(col(Study.id)).where(col(Study.id) == study.id, *_ARE_DUE)
    return session.scalars(due).first() is not None


def lock_study(session: Session, study_id: str) -> Study:
    """The study, locked until the transaction ends. Raises StudyNotFoundError.

    Whoever locks a study and its jobs locks the study first.
    """
    study = _find(session, study_id, is_locked=True)
    if study is None:
        raise StudyNotFoundError(study_id)
    return study


def cancel_study(session: Session, study_id: str) -> Study:
    """Cancel all jobs of a study that have not ended. A repeated request changes nothing.

    Raises StudyStateError if the study has ended.
    """
    study, jobs = _lock_with_jobs(session, study_id)
    if study.cancel_requested_at is None:
        if all(job.status.is_terminal for job in jobs) and not is_racing(study):
            raise StudyStateError(f"study {study.id} has ended; only a live one can be cancelled")
        study.cancel_requested_at = database_now(session)
    cancel_all(session, jobs)
    return study


def pause_study(session: Session, study_id: str) -> Study:
    """Pause all jobs of a study that have not ended, and its race.

    A repeated request changes nothing. Raises StudyStateError if the study has ended or is being
    cancelled.
    """
    study, jobs = _lock_with_jobs(session, study_id)
    live = [job for job in jobs if not job.status.is_terminal]
    if all(job.is_cancelling for job in live) and not is_racing(study):
        state = "is being cancelled" if live else "has ended"
        raise StudyStateError(f"study {study.id} {state}; only a live one can pause")
    study.pause_requested_at = study.pause_requested_at or database_now(session)
    pause_all(session, live)
    return study


def resume_study(session: Session, study_id: str, *, admission: Admission | None = None) -> Study:
    """Continue all jobs of a study that are paused, were cancelled, or failed for another reason
    than their loss; a race goes on.

    Raises StudyStateError if all jobs are judged, and JobStateError if one that is being cancelled
    has not stopped yet, and what `admission` raises.
    """
    study, jobs = _lock_with_jobs(session, study_id)
    study.cancel_requested_at = study.pause_requested_at = None
    # To train a judged job again could only change a verdict that is known.
    open_jobs = [job for job in jobs if not is_judged(job.status, job.failure_kind)]
    if not open_jobs and not is_racing(study):
        raise StudyStateError(
            f"study {study.id} has ended; POST /studies/{study.id}/seeds adds further seeds"
        )
    if open_jobs:
        study.decided_at = None  # their results may open the race again
    if admission is not None:
        live = (JobStatus.queued, JobStatus.running)
        num_jobs = sum(job.status not in live for job in open_jobs)
        datasets = [arm.training_config.dataset for arm in study.arm_list]
        admission.check(session, num_jobs=num_jobs, datasets=datasets)
        study.queued_by = admission.queued_by
    resume_all(session, open_jobs, queued_by=study.queued_by)
    return study


def delete_jobs(
    session: Session, study_id: str, *, delete_files: Callable[[str], None]
) -> int | None:
    """Delete some of the jobs that only this study has, with their files; returns their number.

    Returns None when none is left. Each call should have a transaction of its own: if one is
    interrupted, its jobs are still there and can be deleted again. Raises StudyStateError.
    """
    study = _lock_ended(session, study_id)
    others = select(col(StudyJob.job_id)).where(col(StudyJob.study_id) != study.id)
    is_shared = others.where(col(StudyJob.job_id) == col(Job.id)).exists()
    own = lock_jobs(session, col(Job.study_id) == study.id, ~is_shared, limit=_NUM_DELETED_AT_ONCE)
    if not own:
        return None
    # Another study may have taken one before it was locked.
    shared = set(session.scalars(others.where(col(StudyJob.job_id).in_([job.id for job in own]))))
    jobs = [job for job in own if job.id not in shared]
    remove_all(session, jobs)
    for job in jobs:
        delete_files(job.id)
    return len(jobs)


def delete_study(session: Session, study_id: str) -> int:
    """Delete a study without its jobs; returns how many are left. Raises StudyStateError."""
    study = _lock_ended(session, study_id)
    linked = (col(StudyJob.study_id) == study.id, col(StudyJob.job_id).is_not(None))
    num_left = session.scalars(select(func.count()).select_from(StudyJob).where(*linked)).one()
    session.execute(update(Job).where(col(Job.study_id) == study.id).values(study_id=None))
    session.delete(study)
    forget_study(session, study.id)
    return num_left


def _lock_ended(session: Session, study_id: str) -> Study:
    """The study, locked. Raises StudyStateError unless it and all its jobs have ended."""
    study = lock_study(session, study_id)
    live = (col(Job.study_id) == study.id, col(Job.status).not_in(TERMINAL_STATUSES))
    num_live = session.scalars(select(func.count()).select_from(Job).where(*live)).one()
    if num_live or is_racing(study):
        are = "job has" if num_live == 1 else "jobs have"
        rest = f"{num_live} {are} not ended" if num_live else "its race goes on"
        raise StudyStateError(f"study {study.id}: {rest}; cancel it before deleting it")
    return study


def _place() -> Any:
    return tuple_(col(Study.created_at), col(Study.id))


def _find(session: Session, study_id: str, *, is_locked: bool) -> Study | None:
    # PostgreSQL refuses a text with a NUL; no study's id has one.
    if not study_id.isalnum():
        return None
    return session.get(Study, study_id, with_for_update=is_locked, populate_existing=is_locked)


def _lock_with_jobs(session: Session, study_id: str) -> tuple[Study, list[LockedJob]]:
    """The study and the jobs that it made, locked."""
    study = lock_study(session, study_id)
    return study, lock_jobs(session, col(Job.study_id) == study.id)
