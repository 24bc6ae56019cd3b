"""Studies judged: each arm's seeds as a group, and at planned looks which arms are ruled out.

Everything is computed from the study's plan and its jobs when it is asked for, and nothing is
stored. So other thresholds judge an old study anew.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import load_only
from sqlmodel import Session, col

from server.judging.criteria import Thresholds
from server.judging.decisions import (
    ERROR,
    ArmCount,
    Recommendation,
    recommend,
)
from server.judging.groups import GroupVerdict, SeedResult, is_judged_job, judge_group
from server.judging.histories import read_histories
from server.judging.statistics import DecisionState, SequentialDecision, decide_in_looks
from server.models.tables import Arm, Job, JobStatus, Study, StudyJob

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


class LookPublic(BaseModel):
    """A look that took place: every arm that was still in, by its first seeds."""

    num_seeds: int
    at: datetime | None = Field(description="when the last job that it needed ended")
    ruled_out: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyVerdict:
    """What a study says so far."""

    arms: list[ArmVerdict]
    looks: list[LookPublic]
    next_look: int | None  #: number of seeds; None if no look is left
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
    cache: ResultCache | None = None,
) -> StudyVerdict:
    """Judge a study by its own thresholds, or by others."""
    thresholds = thresholds or Thresholds.model_validate(study.thresholds)
    arms = study.arm_list
    by_arm = read_results(session, study, thresholds=thresholds, cache=cache or ResultCache())
    results = {arm.name: each for arm, each in zip(arms, by_arm, strict=True)}
    sequential = take_looks(study, results)
    groups = [judge_group(each) for each in by_arm]
    out = {entry.arm for entry in sequential.decision.ruled_out}
    verdicts = [
        describe_arm(arm, group, results=results[arm.name], is_out=arm.name in out)
        for arm, group in zip(arms, groups, strict=True)
    ]
    everything = [result for each in by_arm for result in each]
    next_look = _find_next_look(study, sequential)
    return StudyVerdict(
        arms=verdicts,
        looks=_describe_looks(sequential, results),
        next_look=next_look,
        recommendation=_recommend(study, verdicts, sequential, next_look=next_look),
        num_by_status=_count_statuses(everything),
        progress=_measure_progress(everything),
        results=by_arm,
    )


def read_results(
    session: Session, study: Study, *, thresholds: Thresholds, cache: ResultCache
) -> list[list[SeedResult]]:
    """The results of each arm in order of seed, in two queries."""
    links = select(StudyJob).where(col(StudyJob.study_id) == study.id)
    rows = list(session.scalars(links.order_by(col(StudyJob.position), col(StudyJob.arm))))
    of_study = select(col(StudyJob.job_id)).where(col(StudyJob.study_id) == study.id)
    jobs_query = (
        select(Job)
        .options(load_only(*(getattr(Job, name) for name in _COLUMNS)))
        .where(col(Job.id).in_(of_study))
    )
    jobs = {job.id: job for job in session.scalars(jobs_query)}
    found = _judge_jobs(session, rows, jobs=jobs, thresholds=thresholds, cache=cache)
    arms: list[list[SeedResult]] = [[] for _ in study.arms]
    for row in rows:
        deleted = SeedResult(seed=row.seed)
        arms[row.arm].append(deleted if row.job_id is None else found[row.job_id])
    return arms


def _judge_jobs(
    session: Session,
    rows: Sequence[StudyJob],
    *,
    jobs: Mapping[str, Job],
    thresholds: Thresholds,
    cache: ResultCache,
) -> dict[str, SeedResult]:
    """The result of each job by its id; those of jobs that have ended are cached."""
    limits = tuple(thresholds.model_dump().values())
    keys = {
        row.job_id: (*_identify(jobs[row.job_id]), row.is_reused, limits)
        for row in rows
        if row.job_id is not None
    }
    found = cache.find(keys)
    unknown = [row for row in rows if row.job_id is not None and row.job_id not in found]
    judged = [row.job_id for row in unknown if row.job_id and is_judged_job(jobs[row.job_id])]
    histories = read_histories(session, judged)
    fresh = {
        row.job_id: SeedResult.of(
            jobs[row.job_id],
            histories.get(row.job_id, []),
            seed=row.seed,
            thresholds=thresholds,
            is_reused=row.is_reused,
        )
        for row in unknown
        if row.job_id is not None
    }
    cache.keep({keys[job_id]: result for job_id, result in fresh.items() if result.has_ended})
    return found | fresh


def _identify(job: Job) -> tuple[object, ...]:
    """Changes with everything that a judged job's result depends on."""
    return job.id, job.status, job.attempt, job.epochs_completed


def take_looks(study: Study, results: Mapping[str, Sequence[SeedResult]]) -> SequentialDecision:
    """The looks that took place, oldest first, and the decision at the last of them.

    A look waits until each arm that is still in has so many judged seeds, or no other to come.
    """
    passed = {arm: _list_passed(each) for arm, each in results.items()}
    taken: list[int] = []
    while True:
        sequential = decide_in_looks(
            passed,
            looks=taken,
            num_planned_looks=study.num_planned_looks,
            is_race=study.until_decided,
            error=ERROR,
        )
        kept, coming = sequential.decision.kept, study.looks[len(taken) :]
        if not coming or _is_over(study, sequential):
            return sequential
        if not all(_is_ready(results[arm], num_seeds=coming[0]) for arm in kept):
            return sequential
        taken.append(coming[0])


def _list_passed(results: Sequence[SeedResult]) -> list[bool]:
    """Whether each judged seed passed, up to the first seed whose job has not ended."""
    passed: list[bool] = []
    for result in results:
        if not result.has_ended:
            break
        if result.is_judged:
            passed.append(result.has_passed)
    return passed


def _is_ready(results: Sequence[SeedResult], *, num_seeds: int) -> bool:
    """Whether the arm's first judged seeds are known."""
    have_all_ended = all(result.has_ended for result in results)
    return len(_list_passed(results)) >= num_seeds or (have_all_ended and len(results) >= num_seeds)


def _is_over(study: Study, sequential: SequentialDecision) -> bool:
    """Whether a race has found the arm that can be recommended."""
    return study.until_decided and sequential.decision.state == DecisionState.decided


def _find_next_look(study: Study, sequential: SequentialDecision) -> int | None:
    if study.cancel_requested_at is not None or _is_over(study, sequential):
        return None
    coming = study.looks[len(sequential.looks) :]
    return coming[0] if coming else None


def _describe_looks(
    sequential: SequentialDecision, results: Mapping[str, Sequence[SeedResult]]
) -> list[LookPublic]:
    running, looks = dict(results), list[LookPublic]()
    for look in sequential.looks:
        ended = [_find_end(each, num_seeds=look.num_seeds) for each in running.values()]
        known = [moment for moment in ended if moment is not None]
        ruled_out = [entry.arm for entry in look.ruled_out]
        looks.append(LookPublic(num_seeds=look.num_seeds, at=max(known, default=None),
                                ruled_out=ruled_out))  # fmt: skip
        running = {arm: each for arm, each in running.items() if arm not in ruled_out}
    return looks


def _find_end(results: Sequence[SeedResult], *, num_seeds: int) -> datetime | None:
    """When the last of the arm's first judged seeds ended."""
    judged = [result.ended_at for result in results if result.is_judged and result.ended_at]
    return max(judged[:num_seeds], default=None)


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
    study: Study,
    arms: Sequence[ArmVerdict],
    sequential: SequentialDecision,
    *,
    next_look: int | None,
) -> Recommendation:
    """The decision at the last look. Its sentence counts the seeds of that look."""
    num_seeds = sequential.looks[-1].num_seeds if sequential.looks else 0
    counts = {arm.arm: _count_arm(arm, num_seeds=num_seeds) for arm in arms}
    by_name = {arm.arm: arm for arm in arms}
    decided = sequential.decision.arm
    return recommend(
        sequential.decision,
        counts,
        option=by_name[decided].option if decided else None,
        job_id=by_name[decided].median_job_id if decided else None,
        next_look=next_look,
        has_late_looks=len(sequential.looks) > study.num_planned_looks,
    )


def _count_arm(arm: ArmVerdict, *, num_seeds: int) -> ArmCount:
    judged = [seed.has_passed for seed in arm.seeds if seed.has_passed is not None]
    used = judged[:num_seeds]
    return ArmCount(sum(used), len(used))


def _count_statuses(results: Sequence[SeedResult]) -> dict[JobStatus, int]:
    statuses = [result.status for result in results if result.status is not None]
    return {status: statuses.count(status) for status in JobStatus if status in statuses}


def _measure_progress(results: Sequence[SeedResult]) -> float:
    if not results:
        return 1.0
    return sum(1.0 if result.has_ended else result.progress for result in results) / len(results)
