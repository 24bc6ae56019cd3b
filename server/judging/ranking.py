"""Ranking of jobs by their verdicts, and the recommendation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from server.judging.criteria import CriterionStatus
from server.judging.groups import GROUP_METRICS, RANKING_METRICS, read_metric
from server.judging.histories import History
from server.judging.verdicts import Outcome, Verdict
from server.models.tables import Job, JobStatus


class JudgedJob(NamedTuple):
    job: Job
    verdict: Verdict
    epochs: History

    @property
    def ranking_value(self) -> float | None:
        """What decides between jobs that passed equally many criteria."""
        return read_metric(RANKING_METRICS[self.verdict.criteria_set], self.epochs)


class Recommendation(BaseModel):
    job_id: str
    option: str
    reason: str


class Ranking(BaseModel):
    """Ids from best to worst, and the recommended job; `reason` explains why, or why none."""

    ranking: list[str]
    recommendation: Recommendation | None
    reason: str


def rank(judged: Sequence[JudgedJob]) -> Ranking:
    """Rank the jobs that succeeded first, then by passed criteria, then by validation foreground
    IoU (by `evidence` the average precision of the colours), then newest first.

    A job that stopped early may have passed more criteria just because it stopped.
    """
    ordered = sorted(judged, key=_rank_key, reverse=True)
    recommendation, reason = _recommend(ordered)
    return Ranking(
        ranking=[entry.job.id for entry in ordered], recommendation=recommendation, reason=reason
    )


def find_differences(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The option and configuration keys in which jobs differ: `{key: {job_id: value}}`.

    The data's seed is left out where it only follows the seed.
    """
    # Jobs of older versions have no seed of their own for the data.
    settings = {
        job.id: {"option": job.option, "data_seed": job.config.get("seed"), **job.config}
        for job in jobs
    }
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    differences = {
        key: {job_id: values.get(key) for job_id, values in settings.items()} for key in keys
    }
    if differences.get("data_seed") == differences.get("seed"):
        differences.pop("data_seed", None)
    return {
        key: values
        for key, values in differences.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _rank_key(judged: JudgedJob) -> tuple[bool, int, float, float]:
    num_passed = len(judged.verdict.list_names(CriterionStatus.passed))
    value = judged.ranking_value
    has_succeeded = judged.job.status == JobStatus.succeeded
    created_at = judged.job.created_at.timestamp()
    return has_succeeded, num_passed, -1.0 if value is None else value, created_at


def _recommend(ordered: Sequence[JudgedJob]) -> tuple[Recommendation | None, str]:
    """The best job that passed every criterion, or why there is none."""
    successes = [each for each in ordered if each.verdict.outcome == Outcome.success]
    if not successes:
        return None, _explain_no_recommendation(ordered)
    job, verdict = successes[0].job, successes[0].verdict
    title = GROUP_METRICS[RANKING_METRICS[verdict.criteria_set]].title
    value = successes[0].ranking_value
    reason = (
        f"option {job.option} passed all {len(verdict.criteria)} criteria with a {title} of "
        f"{'none' if value is None else f'{value:.2f}'}, {_compare_with_others(len(successes) - 1)}"
    )
    return Recommendation(job_id=job.id, option=job.option, reason=reason), reason


def _compare_with_others(num_others: int) -> str:
    if not num_others:
        return "the only one to do so"
    return f"ahead of {num_others} other job{'s' * (num_others > 1)} that passed all of them"


def _explain_no_recommendation(ordered: Sequence[JudgedJob]) -> str:
    if not ordered:
        return "there is nothing to compare"
    if any(not each.job.status.is_terminal for each in ordered):
        return "no job passed every criterion so far, and some have not ended yet"
    job, verdict = ordered[0].job, ordered[0].verdict
    missed = [c.name for c in verdict.criteria if c.status != CriterionStatus.passed]
    return (
        f"no job passed every criterion; the best, option {job.option} ({job.id}), "
        f"missed {', '.join(missed)}"
    )
