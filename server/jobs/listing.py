"""Finding jobs: by id, or page by page, newest first.

Each filter has an index in this order, so that a page reads about as many rows as it shows,
regardless of the number of jobs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Select, func, select, tuple_, union_all
from sqlalchemy.orm import aliased
from sqlmodel import Session, col

from server.errors import NotFoundError
from server.models.tables import IS_JUDGED, Job, JobLabel, JobStatus

MAX_GROUP_SIZE: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """The conditions that listed jobs meet; an empty filter matches all jobs."""

    statuses: list[JobStatus] = field(default_factory=list)
    option: str | None = None
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


class JobNotFoundError(NotFoundError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}; GET /jobs lists all jobs")


def find_job(session: Session, job_id: str) -> Job:
    """Raises JobNotFoundError."""
    return find_jobs(session, [job_id])[0]


def find_jobs(session: Session, job_ids: Iterable[str]) -> list[Job]:
    """Each job once, in the order of the ids. Raises JobNotFoundError."""
    wanted = dict.fromkeys(job_ids)
    if not wanted:
        return []
    # PostgreSQL refuses a text with a NUL; no job's id has one.
    rows = select(Job).where(col(Job.id).in_([job_id for job_id in wanted if job_id.isalnum()]))
    jobs = {job.id: job for job in session.scalars(rows)}
    for job_id in wanted:
        if job_id not in jobs:
            raise JobNotFoundError(job_id)
    return [jobs[job_id] for job_id in wanted]


def find_newest_succeeded(session: Session, option: str) -> Job:
    """The newest job of an option that succeeded. Raises NotFoundError."""
    newest = (
        select(Job)
        .where(col(Job.option) == option, col(Job.status) == JobStatus.succeeded)
        .order_by(col(Job.created_at).desc(), col(Job.id).desc())
    )
    job = session.scalars(newest.limit(1)).first()
    if job is None:
        raise NotFoundError(f"no job of option {option} has succeeded yet")
    return job


def find_group(session: Session, job: Job) -> list[Job]:
    """The judged jobs of a job's configuration in the order of their seeds, the newest of each.

    Two jobs of one configuration and the same seeds are the same run. The newest jobs are read, up
    to MAX_GROUP_SIZE.
    """
    newest = (
        select(Job)
        .where(
            col(Job.config_sha256) == job.config_sha256,
            IS_JUDGED,
        )
        .order_by(col(Job.created_at).desc(), col(Job.id).desc())
    )
    by_seed: dict[tuple[int, int], Job] = {}
    for each in session.scalars(newest.limit(MAX_GROUP_SIZE)):
        by_seed.setdefault(each.training_config.seeds, each)
    return [by_seed[seeds] for seeds in sorted(by_seed)]


def count_by_status(session: Session) -> dict[JobStatus, int]:
    """The number of jobs of each status."""
    counts = session.execute(select(col(Job.status), func.count()).group_by(col(Job.status))).all()
    return dict.fromkeys(JobStatus, 0) | {row[0]: row[1] for row in counts}


def read_page(session: Session, wanted: JobFilter, *, after: Job | None, limit: int) -> list[Job]:
    """The newest matching jobs, or the newest that are older than the job `after`."""
    pages = [
        _select_newest(wanted, status, after=after).limit(limit)
        for status in dict.fromkeys(wanted.statuses) or [None]
    ]
    return list(session.scalars(pages[0] if len(pages) == 1 else _merge(pages).limit(limit)))


def _select_newest(
    wanted: JobFilter, status: JobStatus | None, *, after: Job | None
) -> Select[Job]:
    jobs = select(Job)
    if status is not None:
        jobs = jobs.where(col(Job.status) == status)
    if wanted.option is not None:
        jobs = jobs.where(col(Job.option) == wanted.option)
    if wanted.name is not None:
        jobs = jobs.where(col(Job.name) == wanted.name)
    created_at, job_id = col(Job.created_at), col(Job.id)
    for key, value in wanted.labels.items():
        label = aliased(JobLabel)
        jobs = jobs.join(label, col(label.job_id) == job_id)
        jobs = jobs.where(col(label.key) == key, col(label.value) == value)
        # The order of the label's index.
        created_at, job_id = col(label.created_at), col(label.job_id)
    if after is not None:
        jobs = jobs.where(tuple_(created_at, job_id) < tuple_(after.created_at, after.id))
    return jobs.order_by(created_at.desc(), job_id.desc())


def _merge(pages: list[Select[Job]]) -> Select[Job]:
    """The pages of several statuses as one, since an index orders the jobs of one status only.

    It is a single statement, so that a job that changes its status meanwhile is listed only once.
    """
    # SQLite allows a limit inside a union only in a subquery.
    parts = [
        select(page.with_only_columns(col(Job.created_at), col(Job.id)).subquery())
        for page in pages
    ]
    newest = union_all(*parts).subquery()
    jobs = select(Job).join(newest, newest.c.id == col(Job.id))
    return jobs.order_by(newest.c.created_at.desc(), newest.c.id.desc())
