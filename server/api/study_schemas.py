"""What the API answers about studies, as JSON."""

import statistics
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from server.jobs.studies import StudyEntry, derive_status
from server.judging.criteria import CriteriaSet
from server.judging.decisions import Recommendation
from server.judging.differences import ArmDifference, compare_kept_arms
from server.judging.groups import SeedResult
from server.judging.looks import LookPublic
from server.judging.studies import ArmVerdict, StudyVerdict
from server.models.columns import count_seconds
from server.models.studies import Arm, Study
from server.models.tables import JobStatus


class StudySummary(BaseModel):
    """A study in a list."""

    id: str
    name: str | None
    metadata: dict[str, str]
    status: JobStatus
    arms: list[str]
    num_seeds: int
    num_jobs: int
    num_by_status: dict[JobStatus, int]
    progress: float = Field(description="of the jobs queued so far, 0 to 1")
    criteria_set: CriteriaSet | str = Field(
        description="the criteria that decide; a set of a later version has another name"
    )
    until_decided: bool
    created_at: datetime

    @classmethod
    def of(cls, entry: StudyEntry) -> Self:
        study = entry.study
        return cls(
            id=study.id,
            name=study.name,
            metadata=study.labels,
            status=entry.status,
            arms=[arm["name"] for arm in study.arms],
            num_seeds=len(study.seeds),
            num_jobs=entry.counts.num_jobs,
            num_by_status=dict(entry.counts.by_status),
            progress=entry.counts.progress,
            criteria_set=study.criteria,
            until_decided=study.until_decided,
            created_at=study.created_at,
        )


class StudyPublic(BaseModel):
    """A study, its arms judged as groups, and what may be said about them."""

    id: str
    name: str | None
    metadata: dict[str, str]
    priority: int
    quick_test: bool
    status: JobStatus
    created_at: datetime
    num_jobs: int
    num_by_status: dict[JobStatus, int]
    progress: float = Field(description="of the jobs queued so far, 0 to 1")
    seconds_left: float | None = Field(description="estimate for the jobs queued so far")
    seeds: list[int]
    data_seed: int | None = Field(description="of the data of all jobs; null: each job's seed")
    criteria_set: CriteriaSet = Field(
        description="the criteria that this answer judges by: those of the query, or else those "
        "that the study was posted with, which decide"
    )
    thresholds: dict[str, float] = Field(description="those that differ from the defaults")
    reuse: bool
    until_decided: bool
    max_seeds: int
    planned_looks: list[int] = Field(description="numbers of seeds")
    looks: list[LookPublic] = Field(description="those that took place, oldest first")
    next_look: int | None = Field(description="number of seeds; null if no look is left")
    arms: list[ArmVerdict]
    differences: list[ArmDifference] = Field(
        description="of the leader among the kept arms to the next best; they decide nothing"
    )
    recommendation: Recommendation

    @classmethod
    def of(cls, study: Study, verdict: StudyVerdict) -> Self:
        return cls(
            **study.model_dump(
                include={"id", "name", "priority", "quick_test", "created_at", "seeds",
                         "data_seed", "reuse", "until_decided", "max_seeds"}
            ),
            thresholds=verdict.thresholds,
            metadata=study.labels,
            criteria_set=verdict.criteria_set,
            status=derive_status(study, verdict.num_by_status),
            num_jobs=sum(len(each) for each in verdict.results),
            num_by_status=verdict.num_by_status,
            progress=verdict.progress,
            seconds_left=_estimate_seconds_left(verdict),
            planned_looks=study.looks,
            looks=verdict.looks,
            next_look=verdict.next_look,
            arms=verdict.arms,
            differences=compare_kept_arms(verdict),
            recommendation=verdict.recommendation,
        )  # fmt: skip


class PlannedArm(BaseModel):
    arm: str
    option: str
    config: dict[str, Any] = Field(description="everything but the seeds")
    config_sha256: str

    @classmethod
    def of(cls, arm: Arm) -> Self:
        config = {k: v for k, v in arm.config.items() if k not in ("seed", "data_seed")}
        return cls(arm=arm.name, option=arm.option, config=config, config_sha256=arm.config_sha256)


class StudyPlan(BaseModel):
    """What a study would be; nothing is stored."""

    arms: list[PlannedArm]
    seeds: list[int] = Field(description="those that would be queued at once")
    num_jobs: int = Field(description="jobs that would be queued at once")
    max_num_jobs: int = Field(description="the same, unless it is a race")
    num_reused: int = Field(description="of the jobs, how many would not be trained again")
    looks: list[int] = Field(description="numbers of seeds")
    estimated_seconds: float | None = Field(
        description="until the jobs queued at once have ended, by the newest jobs and the live "
        "workers; null before any job has succeeded"
    )


class StudyList(BaseModel):
    data: list[StudySummary]
    has_more: bool


class DeletedStudy(BaseModel):
    """What was deleted with a study, and what was kept."""

    id: str
    num_jobs_deleted: int
    num_jobs_kept: int


def _estimate_seconds_left(verdict: StudyVerdict) -> float | None:
    """By the usual duration of each arm's jobs that have ended, with as many running as now.

    The median, since a job that was paused for a night says nothing about the others.
    """
    durations = [_list_durations(arm) for arm in verdict.results]
    known = [seconds for arm in durations for seconds in arm]
    num_running = verdict.num_by_status.get(JobStatus.running, 0)
    if not known or not num_running:
        return None
    usual = statistics.median(known)
    seconds = sum(
        (statistics.median(own) if own else usual) * _sum_rest(arm)
        for own, arm in zip(durations, verdict.results, strict=True)
    )
    return round(seconds / num_running, 1)


def _list_durations(arm: Sequence[SeedResult]) -> list[float]:
    """The seconds of the arm's finished jobs that were trained for this study."""
    ended = [result for result in arm if result.is_finished and not result.is_reused]
    found = (count_seconds(result.started_at, result.ended_at) for result in ended)
    return [seconds for seconds in found if seconds is not None]


def _sum_rest(arm: Sequence[SeedResult]) -> float:
    """How much of the arm's jobs is left, in whole jobs."""
    return sum(1.0 - result.progress for result in arm if not result.has_ended)
