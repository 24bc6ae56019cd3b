"""Studies judged: each arm's seeds as a group, and at planned looks which arms are ruled out.

Everything is computed from the study's plan and its jobs when it is asked for, and nothing is
stored. So other thresholds judge an old study again.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import load_only
from sqlmodel import Session, col

from server.judging.criteria import (
    CriteriaSet,
    Thresholds,
    list_changed,
    read_criteria_set,
    read_thresholds,
)
from server.judging.decisions import Recommendation, recommend
from server.judging.groups import GroupVerdict, SeedResult, judge_group
from server.judging.histories import History, read_in_parts
from server.judging.looks import LookPublic, Looks
from server.models.studies import Arm, Study, StudyJob
from server.models.tables import Job, JobStatus

_MAX_CACHED_RESULTS: Final = 20_000
#: The columns that a verdict and a study's answer need.
_COLUMNS: Final = (
    "id",
    "status",
    "failure_kind",
    "config",
    "attempt",
    "progress",
    "epochs_completed",
    "dataset_summary",
    "started_at",
    "ended_at",
)


class SeedPublic(BaseModel):
    """One seed of an arm."""

    seed: int
    job_id: str | None = Field(description="null once the job was deleted")
    status: JobStatus | None
    is_reused: bool = Field(description="trained before the study")
    has_passed: bool | None = Field(description="null for a seed that is not judged")
    diagnosis: str | None


class ArmVerdict(GroupVerdict):
    """An arm of a study with its seeds, judged together."""

    arm: str
    option: str
    config: dict[str, Any] = Field(description="everything but the seeds")
    config_sha256: str
    state: str = Field(description="kept or ruled_out")
    jobs: list[str | None] = Field(description="ids in the order of the seeds")
    seeds: list[SeedPublic]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyVerdict:
    """What a study says so far, by one set of criteria."""

    criteria_set: CriteriaSet
    thresholds: dict[str, float]  #: that differ from the defaults
    arms: list[ArmVerdict]
    looks: list[LookPublic]
    next_look: int | None  #: number of seeds; None if no look is left
    coming_looks: list[int]  #: all that are left
    late_looks: list[int]  #: of those that took place, which were planned after others had
    is_cut_short: bool  #: the last look took place because the study was cancelled
    recommendation: Recommendation
    num_by_status: dict[JobStatus, int]
    progress: float  #: of the jobs queued so far, 0 to 1
    results: list[list[SeedResult]]  #: by arm, in order of seed

    @property
    def kept(self) -> list[str]:
        return self.recommendation.kept


class ResultCache:
    """Results of ended jobs: an open page asks for a study of a thousand jobs every few seconds."""

    def __init__(self) -> None:
        self._results: dict[tuple[object, ...], SeedResult] = {}
        self._lock = threading.Lock()

    def find(self, keys: Mapping[str, tuple[object, ...]]) -> dict[str, SeedResult]:
        with self._lock:
            return {name: self._results[key] for name, key in keys.items() if key in self._results}

    def keep(self, results: Mapping[tuple[object, ...], SeedResult]) -> None:
        with self._lock:
            if len(self._results) + len(results) > _MAX_CACHED_RESULTS:
                self._results.clear()
            self._results.update(results)


def judge_study(
    session: Session,
    study: Study,
    *,
    thresholds: Thresholds | None = None,
    criteria_set: CriteriaSet | None = None,
    cache: ResultCache | None = None,
) -> StudyVerdict:
    """Judge a study by its own criteria and thresholds, or by others."""
    thresholds = thresholds or read_thresholds(study.thresholds)
    criteria_set = criteria_set or read_criteria_set(study.criteria)
    arms = study.arm_list
    by_arm = read_results(
        session,
        study,
        thresholds=thresholds,
        criteria_set=criteria_set,
        cache=cache or ResultCache(),
    )
    results = {arm.name: each for arm, each in zip(arms, by_arm, strict=True)}
    looks = Looks(study, results)
    groups = [judge_group(each, criteria_set=criteria_set) for each in by_arm]
    out = {entry.arm for entry in looks.sequential.decision.ruled_out}
    verdicts = [
        describe_arm(arm, group, results=results[arm.name], is_out=arm.name in out)
        for arm, group in zip(arms, groups, strict=True)
    ]
    everything = [result for each in by_arm for result in each]
    return StudyVerdict(
        criteria_set=criteria_set,
        thresholds=list_changed(thresholds),
        arms=verdicts,
        looks=looks.describe(),
        next_look=looks.find_next(),
        coming_looks=looks.list_coming(),
        late_looks=looks.late,
        is_cut_short=looks.is_cut_short,
        recommendation=_recommend(verdicts, looks, criteria_set=criteria_set),
        num_by_status=_count_statuses(everything),
        progress=_measure_progress(everything),
        results=by_arm,
    )


def read_results(
    session: Session,
    study: Study,
    *,
    thresholds: Thresholds,
    criteria_set: CriteriaSet,
    cache: ResultCache,
) -> list[list[SeedResult]]:
    """The results of each arm in order of seed, with a few queries however many there are."""
    links = select(StudyJob).where(col(StudyJob.study_id) == study.id)
    rows = list(session.scalars(links.order_by(col(StudyJob.position), col(StudyJob.arm))))
    of_study = select(col(StudyJob.job_id)).where(col(StudyJob.study_id) == study.id)
    jobs_query = (
        select(Job)
        .options(load_only(*(getattr(Job, name) for name in _COLUMNS)))
        .where(col(Job.id).in_(of_study))
    )
    jobs = {job.id: job for job in session.scalars(jobs_query)}
    # A job may have been deleted since the rows were read.
    known = [row for row in rows if row.job_id in jobs]
    found = _judge_jobs(
        session, known, jobs=jobs, thresholds=thresholds, criteria_set=criteria_set, cache=cache
    )
    arms: list[list[SeedResult]] = [[] for _ in study.arms]
    for row in rows:
        if row.arm >= len(arms):
            continue  # of an arm that another version stored, and that cannot be read
        deleted = SeedResult(seed=row.seed, position=row.position)
        arms[row.arm].append(found.get(row.job_id or "", deleted))
    return arms


def _judge_jobs(
    session: Session,
    rows: Sequence[StudyJob],
    *,
    jobs: Mapping[str, Job],
    thresholds: Thresholds,
    criteria_set: CriteriaSet,
    cache: ResultCache,
) -> dict[str, SeedResult]:
    """The result of each job by its id; those of jobs that have ended are cached."""
    rules = (criteria_set, *thresholds.model_dump().values())
    by_id = {row.job_id: row for row in rows if row.job_id is not None}
    keys = {
        job_id: (*_identify(jobs[job_id]), row.position, row.is_reused, rules)
        for job_id, row in by_id.items()
    }
    found = cache.find(keys)
    unknown = by_id.keys() - found.keys()
    fresh = {
        job.id: SeedResult.of(
            job,
            epochs,
            seed=by_id[job.id].seed,
            position=by_id[job.id].position,
            thresholds=thresholds,
            criteria_set=criteria_set,
            is_reused=by_id[job.id].is_reused,
        )
        for job, epochs in _read_epochs(session, [jobs[job_id] for job_id in unknown])
    }
    cache.keep({keys[job_id]: result for job_id, result in fresh.items() if result.has_ended})
    return found | fresh


def _read_epochs(session: Session, jobs: Sequence[Job]) -> Iterator[tuple[Job, History]]:
    """Each job with its epochs; one that is not judged needs none."""
    yield from ((job, []) for job in jobs if not job.is_judged)
    yield from read_in_parts(session, [job for job in jobs if job.is_judged])


def _identify(job: Job) -> tuple[object, ...]:
    """Changes with everything that a judged job's result depends on."""
    return job.id, job.status, job.attempt, job.epochs_completed


def describe_arm(
    arm: Arm, group: GroupVerdict, *, results: Sequence[SeedResult], is_out: bool
) -> ArmVerdict:
    """An arm's group with its configuration and its seeds."""
    config = {key: value for key, value in arm.config.items() if key not in ("seed", "data_seed")}
    return ArmVerdict(
        **group.model_dump(),
        arm=arm.name,
        option=arm.option,
        config=config,
        config_sha256=arm.config_sha256,
        state="ruled_out" if is_out else "kept",
        jobs=[result.job_id for result in results],
        seeds=[
            SeedPublic(
                seed=result.seed,
                job_id=result.job_id,
                status=result.status,
                is_reused=result.is_reused,
                has_passed=result.has_passed if result.is_judged else None,
                diagnosis=result.diagnosis,
            )
            for result in results
        ],
    )


def _recommend(
    arms: Sequence[ArmVerdict], looks: Looks, *, criteria_set: CriteriaSet
) -> Recommendation:
    """The decision at the last look. Its sentence counts the seeds of that look."""
    decision, num_looks = looks.sequential.decision, len(looks.sequential.looks)
    decided = next((arm for arm in arms if arm.arm == decision.arm), None)
    return recommend(
        decision,
        looks.count(),
        option=decided.option if decided else None,
        job_id=decided.median_job_id if decided else None,
        next_look=looks.find_next(),
        has_looked=num_looks > 0,
        has_late_looks=bool(looks.late),
        is_cut_short=looks.is_cut_short,
        criteria_set=criteria_set,
    )


def _count_statuses(results: Sequence[SeedResult]) -> dict[JobStatus, int]:
    statuses = [result.status for result in results if result.status is not None]
    return {status: statuses.count(status) for status in JobStatus if status in statuses}


def _measure_progress(results: Sequence[SeedResult]) -> float:
    if not results:
        return 1.0
    return sum(1.0 if result.has_ended else result.progress for result in results) / len(results)
