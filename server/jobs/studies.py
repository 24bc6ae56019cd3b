"""Studies: arms times seeds, queued together and stopped together.

A study and its jobs are stored in one transaction. What a study answers is computed from its jobs
in `server.judging.studies`; only its plan is stored, and how far it was carried out.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import func, select, tuple_, update
from sqlmodel import Session, col

from server.database.engine import database_now
from server.errors import ConflictError, NotFoundError
from server.jobs.queue import cancel_all, enqueue_all, pause_all, resume_all
from server.jobs.submission import check_queue, new_job
from server.models.configuration import TrainingConfig
from server.models.tables import (
    TERMINAL_STATUSES,
    Arm,
    FailureKind,
    Job,
    JobLabel,
    JobStatus,
    Study,
    StudyJob,
)

MAX_ARMS: Final = 20
MAX_SEEDS: Final = 100
MAX_JOBS: Final = 2000
#: Jobs by whose duration that of others is estimated.
_NUM_ESTIMATING: Final = 50

Counts = Mapping[JobStatus, int]


class StudyNotFoundError(NotFoundError):
    """No study has this id."""

    def __init__(self, study_id: str) -> None:
        super().__init__(f"there is no study {study_id!r}; GET /studies lists all studies")


class StudyStateError(ConflictError):
    """The study's state does not allow the request."""


@dataclass(frozen=True, slots=True)
class StudyEntry:
    """A study in a list, with the number of its jobs of each status and their mean progress."""

    study: Study
    counts: Counts
    progress: float

    @property
    def status(self) -> JobStatus:
        return derive_status(self.study, self.counts)


def find_study(session: Session, study_id: str) -> Study:
    """Raises StudyNotFoundError."""
    # PostgreSQL refuses a text with a NUL; no study's id has one.
    study = session.get(Study, study_id) if study_id.isalnum() else None
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
    counts, progress = count_jobs(session, [study.id for study in studies])
    return [StudyEntry(study, counts[study.id], progress[study.id]) for study in studies]


def count_jobs(
    session: Session, study_ids: Sequence[str]
) -> tuple[dict[str, dict[JobStatus, int]], dict[str, float]]:
    """The number of jobs of each study by status, and their mean progress."""
    counts: dict[str, dict[JobStatus, int]] = {study_id: {} for study_id in study_ids}
    done = dict.fromkeys(study_ids, 0.0)
    rows = (
        select(col(StudyJob.study_id), col(Job.status), func.count(), func.sum(col(Job.progress)))
        .join(Job, col(Job.id) == col(StudyJob.job_id))
        .where(col(StudyJob.study_id).in_(study_ids))
        .group_by(col(StudyJob.study_id), col(Job.status))
    )
    for study_id, status, num_jobs, progress in session.execute(rows):
        counts[study_id][status] = num_jobs
        # What has ended makes no further progress.
        done[study_id] += num_jobs if status in TERMINAL_STATUSES else progress
    totals = {study_id: sum(each.values()) for study_id, each in counts.items()}
    return counts, {
        study_id: done[study_id] / total if total else 1.0 for study_id, total in totals.items()
    }


def derive_status(study: Study, counts: Counts) -> JobStatus:
    """The status of a study, in the words of its jobs.

    A race without jobs to run is running: its next look is being queued.
    """
    is_open = is_racing(study)
    if counts.get(JobStatus.running):
        return JobStatus.running
    if counts.get(JobStatus.queued):
        has_begun = len([status for status, number in counts.items() if number]) > 1
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


def list_due_races(session: Session) -> list[str]:
    """The races whose jobs have all ended, so that a look is due."""
    unfinished = (
        select(col(StudyJob.study_id))
        .join(Job, col(Job.id) == col(StudyJob.job_id))
        .where(col(StudyJob.study_id) == col(Study.id), col(Job.status).not_in(TERMINAL_STATUSES))
    )
    due = select(col(Study.id)).where(
        col(Study.until_decided).is_(True),
        col(Study.decided_at).is_(None),
        col(Study.cancel_requested_at).is_(None),
        col(Study.pause_requested_at).is_(None),
        ~unfinished.exists(),
    )
    return list(session.scalars(due))


def submit_study(
    session: Session, study: Study, *, seeds: Sequence[int], max_queued_jobs: int | None = None
) -> Study:
    """Store a study and queue its jobs, in the caller's transaction. Raises QueueFullError."""
    study.created_at = database_now(session)
    study.seeds = []
    session.add(study)
    session.flush()
    add_seeds(session, study, seeds, max_queued_jobs=max_queued_jobs)
    return study


def add_seeds(
    session: Session,
    study: Study,
    seeds: Sequence[int],
    *,
    arms: Iterable[str] | None = None,
    max_queued_jobs: int | None = None,
) -> int:
    """Queue further seeds of the named arms, of all without names; returns the number of jobs.

    Seed by seed with the arms in turn, so that an early look is balanced. A finished job of the
    same identity and seed is taken instead if the study asked for that. Raises QueueFullError.
    """
    chosen = None if arms is None else set(arms)
    known = list(enumerate(study.arm_list))
    wanted = [(i, arm) for i, arm in known if chosen is None or arm.name in chosen]
    reusable = _find_reusable(session, study, arms=[arm for _, arm in wanted])
    jobs, links = list[Job](), list[StudyJob]()
    first = len(study.seeds)
    for position, seed in enumerate(seeds, first):
        for index, arm in wanted:
            job_id = reusable.get((arm.config_sha256, seed))
            if job_id is None:
                job = _make_job(study, arm, seed=seed)
                jobs.append(job)
            links.append(
                StudyJob(
                    study_id=study.id,
                    seed=seed,
                    arm=index,
                    position=position,
                    job_id=job_id or job.id,
                    is_reused=job_id is not None,
                )
            )
    _queue_jobs(session, jobs, max_queued_jobs=max_queued_jobs)
    session.add_all(links)
    study.seeds = [*study.seeds, *seeds]
    session.flush()
    return len(links)


def count_reusable(session: Session, study: Study, seeds: Sequence[int]) -> int:
    """How many of the study's jobs with these seeds would not be trained again."""
    arms = study.arm_list
    known = _find_reusable(session, study, arms=arms)
    return sum((arm.config_sha256, seed) in known for arm in arms for seed in seeds)


def estimate_seconds(session: Session, arms: Sequence[Arm], *, num_workers: int) -> float | None:
    """The seconds that one job of each arm takes together; None before any job has ended.

    By the newest jobs that succeeded: those of the same configuration, else by their grids.
    """
    newest = (
        select(col(Job.config_sha256), col(Job.config), col(Job.started_at), col(Job.ended_at))
        .where(col(Job.status) == JobStatus.succeeded)
        .order_by(col(Job.created_at).desc(), col(Job.id).desc())
    )
    by_identity: dict[str, list[float]] = {}
    per_grid: list[float] = []
    for sha256, config, started_at, ended_at in session.execute(newest.limit(_NUM_ESTIMATING)):
        if started_at is not None and ended_at is not None:
            seconds = (ended_at - started_at).total_seconds()
            by_identity.setdefault(sha256, []).append(seconds)
            per_grid.append(seconds / _count_grids(config))
    if not per_grid:
        return None
    speed = statistics.median(per_grid)
    of_arms = [
        statistics.median(by_identity[arm.config_sha256])
        if arm.config_sha256 in by_identity
        else speed * _count_grids(arm.config)
        for arm in arms
    ]
    return sum(of_arms) / max(1, num_workers)


def _count_grids(config: Mapping[str, Any]) -> int:
    """How many grids a job of this configuration trains on, over all epochs."""
    return int(config["epochs"]) * int(config["num_samples"])


def extend_study(
    session: Session,
    study_id: str,
    *,
    num_seeds: int,
    arms: Iterable[str] | None,
    looks: Sequence[int],
    max_queued_jobs: int | None = None,
) -> Study:
    """Queue further seeds and plan `looks` at them; a study that was cancelled goes on with them.

    Raises StudyStateError above the limits, and QueueFullError.
    """
    study = lock_study(session, study_id)
    total = len(study.seeds) + num_seeds
    if total > MAX_SEEDS:
        raise StudyStateError(
            f"study {study.id} has {len(study.seeds)} seeds; {MAX_SEEDS} are allowed"
        )
    study.cancel_requested_at = study.decided_at = None
    study.max_seeds = max(study.max_seeds, total)
    study.looks = list(looks)
    seeds = next_seeds(study, num=num_seeds)
    add_seeds(session, study, seeds, arms=arms, max_queued_jobs=max_queued_jobs)
    return study


def next_seeds(study: Study, *, num: int) -> list[int]:
    """The smallest seeds that the study does not have."""
    taken = set(study.seeds)
    candidates = (seed for seed in range(len(taken) + num) if seed not in taken)
    return [seed for seed, _ in zip(candidates, range(num), strict=False)]


def lock_study(session: Session, study_id: str) -> Study:
    """The study, locked until the transaction ends. Raises StudyNotFoundError."""
    find_study(session, study_id)
    return session.get_one(Study, study_id, with_for_update=True, populate_existing=True)


def cancel_study(session: Session, study_id: str) -> Study:
    """Cancel all jobs of a study that have not ended. A repeated request changes nothing.

    Raises StudyStateError if the study has ended.
    """
    study, jobs = _lock_with_jobs(session, study_id)
    live = [job for job in jobs if not job.status.is_terminal]
    if study.cancel_requested_at is None:
        if not live and not is_racing(study):
            raise StudyStateError(f"study {study.id} has ended; only a live one can be cancelled")
        study.cancel_requested_at = database_now(session)
    cancel_all(session, live)
    return study


def pause_study(session: Session, study_id: str) -> Study:
    """Pause all jobs of a study that have not ended, and its race.

    A repeated request changes nothing. Raises StudyStateError if the study has ended.
    """
    study, jobs = _lock_with_jobs(session, study_id)
    live = [job for job in jobs if not job.status.is_terminal and not job.cancel_requested_at]
    if not live and not is_racing(study):
        raise StudyStateError(f"study {study.id} has ended; only a live one can pause")
    study.pause_requested_at = study.pause_requested_at or database_now(session)
    pause_all(session, live)
    return study


def resume_study(session: Session, study_id: str) -> Study:
    """Continue all jobs of a study that are paused, were cancelled, or failed for another reason
    than their loss; a race goes on.

    Raises StudyStateError if a cancelled job has not stopped yet, or if all jobs are judged.
    """
    study, jobs = _lock_with_jobs(session, study_id)
    study.cancel_requested_at = study.pause_requested_at = None
    open_jobs = [job for job in jobs if not _is_final(job)]
    if not open_jobs and not is_racing(study):
        raise StudyStateError(
            f"study {study.id} has ended; POST /studies/{study.id}/seeds adds further seeds"
        )
    resume_all(session, open_jobs)
    return study


def detach_jobs(session: Session, study_id: str) -> int:
    """Delete a study without its jobs; returns their number. Raises StudyStateError."""
    study, jobs = _lock_with_jobs(session, study_id)
    check_ended(study, jobs)
    session.execute(update(Job).where(col(Job.study_id) == study.id).values(study_id=None))
    session.delete(study)
    return len(jobs)


def list_own_jobs(session: Session, study_id: str) -> list[str]:
    """The jobs that only this study has, to be deleted with it. Raises StudyStateError."""
    study, jobs = _lock_with_jobs(session, study_id)
    check_ended(study, jobs)
    shared = select(col(StudyJob.job_id)).where(col(StudyJob.study_id) != study.id)
    own = select(col(Job.id)).where(col(Job.study_id) == study.id, col(Job.id).not_in(
        shared.where(col(StudyJob.job_id).is_not(None))))  # fmt: skip
    return list(session.scalars(own))


def check_ended(study: Study, jobs: Sequence[Job]) -> None:
    """Raises StudyStateError unless the study and all its jobs have ended."""
    num_live = sum(not job.status.is_terminal for job in jobs)
    if num_live or is_racing(study):
        rest = f"{num_live} of its jobs have not ended" if num_live else "its race goes on"
        raise StudyStateError(f"study {study.id}: {rest}; cancel it before deleting it")


def _place() -> Any:
    return tuple_(col(Study.created_at), col(Study.id))


def _is_final(job: Job) -> bool:
    """Whether the job is judged: to train it again could only change a verdict that is known."""
    is_numeric = job.failure_kind == FailureKind.numeric
    return job.status == JobStatus.succeeded or (job.status == JobStatus.failed and is_numeric)


def _lock_with_jobs(session: Session, study_id: str) -> tuple[Study, list[Job]]:
    """The study and the jobs that it made, locked in the order of their ids."""
    study = lock_study(session, study_id)
    jobs = select(Job).where(col(Job.study_id) == study_id).order_by(col(Job.id))
    return study, list(session.scalars(jobs.with_for_update()))


def _make_job(study: Study, arm: Arm, *, seed: int) -> Job:
    data_seed = seed if study.data_seed is None else study.data_seed
    config = {**arm.config, "seed": seed, "data_seed": data_seed}
    job = new_job(
        TrainingConfig.model_validate(config),
        option=arm.option,
        quick_test=study.quick_test,
        name=f"{arm.name} seed {seed}",
        labels=study.labels,
        priority=study.priority,
    )
    job.config_sha256 = arm.config_sha256
    job.study_id = study.id
    return job


def _queue_jobs(session: Session, jobs: Sequence[Job], *, max_queued_jobs: int | None) -> None:
    if not jobs:
        return
    if max_queued_jobs is not None:
        check_queue(session, num_jobs=len(jobs), max_queued_jobs=max_queued_jobs)
    now = database_now(session)
    for place, job in enumerate(jobs):
        # Workers claim the oldest first.
        job.created_at = now + timedelta(microseconds=place)
    session.add_all(jobs)
    session.flush()
    session.add_all(
        JobLabel(job_id=job.id, key=key, value=value, created_at=job.created_at)
        for job in jobs
        for key, value in job.labels.items()
    )
    enqueue_all(session, jobs)


def _find_reusable(
    session: Session, study: Study, *, arms: Sequence[Arm]
) -> dict[tuple[str, int], str]:
    """Judged jobs by identity and seed: the newest, preferably on the study's own data.

    If the request fixed the data's seed, only jobs on the same data are taken.
    """
    if not study.reuse:
        return {}
    jobs = (
        select(col(Job.id), col(Job.config_sha256), col(Job.config))
        .where(
            col(Job.config_sha256).in_([arm.config_sha256 for arm in arms]),
            (col(Job.status) == JobStatus.succeeded)
            | (
                (col(Job.status) == JobStatus.failed)
                & (col(Job.failure_kind) == FailureKind.numeric)
            ),
        )
        .order_by(col(Job.created_at), col(Job.id))
    )
    found: dict[tuple[str, int], tuple[bool, str]] = {}
    for job_id, sha256, config in session.execute(jobs):
        seed = config["seed"]
        own_data = seed if study.data_seed is None else study.data_seed
        is_on_own_data = config.get("data_seed", seed) == own_data
        if study.is_data_seed_fixed and not is_on_own_data:
            continue
        before = found.get((sha256, seed))
        if before is None or is_on_own_data or not before[0]:
            found[sha256, seed] = (is_on_own_data, job_id)
    return {key: job_id for key, (_, job_id) in found.items()}
