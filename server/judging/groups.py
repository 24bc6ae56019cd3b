"""Groups: the jobs of one configuration, which differ only in their seeds, judged together.

A new metric of groups is a function registered in `GROUP_METRICS`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Self

from pydantic import BaseModel, Field

from server.judging.criteria import (
    CriteriaSet,
    CriterionName,
    CriterionStatus,
    Diagnosis,
    Evidence,
    Thresholds,
    list_criteria,
)
from server.judging.histories import History
from server.judging.statistics import wilson_interval
from server.judging.verdicts import Assessment, Outcome, assess
from server.models.tables import Job, JobStatus


class Side(StrEnum):
    """What a metric is about: what argmax paints, or what the model knows wherever argmax draws the
    line."""

    paints = "what it paints"
    knows = "what it knows"


class GroupMetric(StrEnum):
    """Values of single runs that are shown for each seed. They never decide."""

    val_foreground_iou = "val_foreground_iou"
    train_pixel_accuracy = "train_pixel_accuracy"
    val_foreground_recall = "val_foreground_recall"
    val_foreground_precision = "val_foreground_precision"
    val_painted_share = "val_painted_share"
    min_kl_per_dimension = "min_kl_per_dimension"
    val_foreground_ap = "val_foreground_ap"
    val_colour_ap = "val_colour_ap"
    val_matched_iou = "val_matched_iou"
    val_mutual_information = "val_mutual_information"
    val_active_units_variance = "val_active_units_variance"


@dataclass(frozen=True, slots=True)
class RegisteredMetric:
    title: str
    side: Side
    read: Callable[[History], float | None]  # of a run, by its final epoch


#: Every metric, in the order of display, one side after the other. Jobs that are older than a
#: measure have no value.
GROUP_METRICS: Final[dict[GroupMetric, RegisteredMetric]] = {
    GroupMetric.val_foreground_iou: RegisteredMetric(
        "foreground IoU", Side.paints, lambda epochs: epochs[-1].val_foreground_iou
    ),
    GroupMetric.train_pixel_accuracy: RegisteredMetric(
        "training accuracy", Side.paints, lambda epochs: epochs[-1].train_pixel_accuracy
    ),
    GroupMetric.val_foreground_recall: RegisteredMetric(
        "foreground recall", Side.paints, lambda epochs: epochs[-1].val_foreground_recall
    ),
    GroupMetric.val_foreground_precision: RegisteredMetric(
        "foreground precision", Side.paints, lambda epochs: epochs[-1].val_foreground_precision
    ),
    GroupMetric.val_painted_share: RegisteredMetric(
        "painted share", Side.paints, lambda epochs: 1 - epochs[-1].val_background_share
    ),
    GroupMetric.min_kl_per_dimension: RegisteredMetric(
        "weakest KL (nats)",
        Side.knows,
        lambda epochs: min(epochs[-1].val_kl_per_dimension, default=None),
    ),
    GroupMetric.val_foreground_ap: RegisteredMetric(
        "foreground AP", Side.knows, lambda epochs: epochs[-1].val_foreground_ap
    ),
    GroupMetric.val_colour_ap: RegisteredMetric(
        "colour AP", Side.knows, lambda epochs: epochs[-1].val_colour_ap
    ),
    GroupMetric.val_matched_iou: RegisteredMetric(
        "IoU at the true share", Side.knows, lambda epochs: epochs[-1].val_matched_iou
    ),
    GroupMetric.val_mutual_information: RegisteredMetric(
        "mutual information (nats)", Side.knows, lambda epochs: epochs[-1].val_mutual_information
    ),
    GroupMetric.val_active_units_variance: RegisteredMetric(
        "active dimensions", Side.knows, lambda epochs: epochs[-1].val_active_units_variance
    ),
}
#: By it runs with equally many passed criteria are ordered, and the median and the worst run of a
#: group are found. The IoU is that of argmax, which the evidence leaves out of account.
RANKING_METRICS: Final = {
    CriteriaSet.spec: GroupMetric.val_foreground_iou,
    CriteriaSet.evidence: GroupMetric.val_colour_ap,
}


def read_metric(metric: GroupMetric, epochs: History) -> float | None:
    """The value of the final epoch; a run that diverged may have none."""
    value = GROUP_METRICS[metric].read(epochs) if epochs else None
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResult:
    """One seed of a group: its job, and what that contributes.

    A seed is judged if its job succeeded, or failed as `numeric`, which never passes, and nothing
    that its verdict needs is unknown. A seed whose job ended otherwise, or was deleted, is missing:
    machines and people lose jobs, not losses. A finished one whose verdict is `undecided` counts
    as nothing, too.
    """

    seed: int
    position: int = 0  #: of the seed in its study
    job_id: str | None = None
    status: JobStatus | None = None
    is_reused: bool = False
    progress: float = 0.0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    has_passed: bool = False
    diagnosis: Diagnosis | None = None
    is_finished: bool = False  #: its job was trained to its end, or diverged
    is_judged: bool = False
    criteria: Mapping[CriterionName, CriterionStatus] = field(default_factory=dict)
    metrics: Mapping[GroupMetric, float | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        job: Job,
        epochs: History,
        *,
        seed: int,
        thresholds: Thresholds,
        criteria_set: CriteriaSet,
        position: int = 0,
        is_reused: bool = False,
    ) -> Self:
        evidence = Evidence(job, epochs, thresholds, criteria_set)
        found = assess(evidence) if job.is_judged else None
        return cls.of_assessment(evidence, found, seed=seed, position=position, is_reused=is_reused)

    @classmethod
    def of_assessment(
        cls,
        evidence: Evidence,
        found: Assessment | None,
        *,
        seed: int,
        position: int = 0,
        is_reused: bool = False,
    ) -> Self:
        """What was found of a job that is judged; None of others."""
        job = evidence.job
        return cls(
            seed=seed,
            position=position,
            job_id=job.id,
            status=job.status,
            is_reused=is_reused,
            progress=job.progress,
            started_at=job.started_at,
            ended_at=job.ended_at,
            is_finished=found is not None,
            is_judged=found is not None and found.outcome != Outcome.undecided,
            has_passed=found is not None and found.outcome == Outcome.success,
            diagnosis=found.diagnosis if found else None,
            criteria={name: each.status for name, each in found.findings.items()} if found else {},
            metrics=_read_metrics(evidence.epochs) if found else {},
        )

    @property
    def has_ended(self) -> bool:
        return self.status is None or self.status.is_terminal

    @property
    def is_missing(self) -> bool:
        return self.has_ended and not self.is_finished


class GroupCriterion(BaseModel):
    """In how many of the finished runs with data a criterion passed."""

    name: CriterionName
    num_passed: int
    num_judged: int


class MetricSummary(BaseModel):
    """A metric's values in the order of the seeds; null for a seed without one."""

    values: list[float | None]
    median: float | None
    min: float | None
    max: float | None


class GroupVerdict(BaseModel):
    """How many of a group's seeds passed every criterion, and its values by seed."""

    num_passed: int
    num_judged: int
    num_missing: int = Field(description="seeds whose job failed for another reason than its loss, "
                             "was cancelled or deleted")  # fmt: skip
    num_undecided: int = Field(
        description="finished seeds for which a criterion has no data; they count as nothing"
    )
    pass_rate: float | None
    pass_rate_interval: tuple[float, float] | None = Field(description="95 %, Wilson (1927)")
    criteria: list[GroupCriterion]
    metrics: dict[GroupMetric, MetricSummary]
    diagnoses: dict[Diagnosis, int]
    median_job_id: str | None = Field(
        description="the finished run with the median foreground IoU, by `evidence` colour AP"
    )
    worst_job_id: str | None = Field(
        description="the finished run with the lowest one; a run that diverged, if there is any"
    )


def judge_group(results: Sequence[SeedResult], *, criteria_set: CriteriaSet) -> GroupVerdict:
    """The results of a group's seeds together; seeds that have not ended count as nothing yet.

    `criteria_set` is the one by which they were judged.
    """
    judged = [result for result in results if result.is_judged]
    finished = [result for result in results if result.is_finished]
    num_passed = sum(result.has_passed for result in judged)
    ordered = _order(finished, metric=RANKING_METRICS[criteria_set])
    return GroupVerdict(
        num_passed=num_passed,
        num_judged=len(judged),
        num_missing=sum(result.is_missing for result in results),
        num_undecided=len(finished) - len(judged),
        pass_rate=num_passed / len(judged) if judged else None,
        pass_rate_interval=wilson_interval(num_passed, len(judged)),
        criteria=[_count_criterion(name, finished) for name in list_criteria(criteria_set)],
        metrics={name: _summarise(name, results) for name in GroupMetric},
        diagnoses=dict(Counter(result.diagnosis for result in finished if result.diagnosis)),
        median_job_id=ordered[(len(ordered) - 1) // 2].job_id if ordered else None,
        worst_job_id=ordered[0].job_id if ordered else None,
    )


def _read_metrics(epochs: History) -> dict[GroupMetric, float | None]:
    return {metric: read_metric(metric, epochs) for metric in GroupMetric}


def _order(finished: Sequence[SeedResult], *, metric: GroupMetric) -> list[SeedResult]:
    """From the worst to the best run. One that diverged is worse than all others, whatever it had
    reached before."""

    def key(result: SeedResult) -> tuple[bool, float, int]:
        value = result.metrics.get(metric)
        has_succeeded = result.status == JobStatus.succeeded
        return has_succeeded, -1.0 if value is None else value, result.seed

    return sorted(finished, key=key)


def _count_criterion(name: CriterionName, finished: Sequence[SeedResult]) -> GroupCriterion:
    statuses = [result.criteria.get(name, CriterionStatus.no_data) for result in finished]
    num_passed = statuses.count(CriterionStatus.passed)
    num_judged = num_passed + statuses.count(CriterionStatus.failed)
    return GroupCriterion(name=name, num_passed=num_passed, num_judged=num_judged)


def _summarise(name: GroupMetric, results: Sequence[SeedResult]) -> MetricSummary:
    values = [result.metrics.get(name) for result in results]
    found = [value for value in values if value is not None]
    return MetricSummary(
        values=values,
        median=statistics.median(found) if found else None,
        min=min(found, default=None),
        max=max(found, default=None),
    )
