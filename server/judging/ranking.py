"""Ranking of jobs by their verdicts, and the recommendation."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from server.judging.criteria import CriterionStatus
from server.judging.verdicts import Outcome, Verdict
from server.models.tables import Job

Judged = tuple[Job, Verdict]


class Recommendation(BaseModel):
    job_id: str
    option: str
    reason: str


class Ranking(BaseModel):
    """Ids from best to worst, and the recommended job; `reason` explains why, or why none."""

    ranking: list[str]
    recommendation: Recommendation | None
    reason: str


def rank(judged: Sequence[Judged]) -> Ranking:
    """Rank by passed criteria, then validation foreground IoU, then newest first."""
    ordered = sorted(judged, key=_rank_key, reverse=True)
    recommendation, reason = _recommend(ordered)
    return Ranking(
        ranking=[job.id for job, _ in ordered], recommendation=recommendation, reason=reason
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


def _rank_key(judged: Judged) -> tuple[int, float, float]:
    job, verdict = judged
    num_passed = len(verdict.list_names(CriterionStatus.passed))
    iou = -1.0 if job.val_foreground_iou is None else job.val_foreground_iou
    return num_passed, iou, job.created_at.timestamp()


def _recommend(ordered: Sequence[Judged]) -> tuple[Recommendation | None, str]:
    """The best job that passed every criterion, or why there is none."""
    successes = [(job, verdict) for job, verdict in ordered if verdict.outcome == Outcome.success]
    if not successes:
        return None, _explain_no_recommendation(ordered)
    job, verdict = successes[0]
    iou = "none" if job.val_foreground_iou is None else f"{job.val_foreground_iou:.2f}"
    reason = (
        f"option {job.option} passed all {len(verdict.criteria)} criteria with a "
        f"foreground IoU of {iou}, {_compare_with_others(len(successes) - 1)}"
    )
    return Recommendation(job_id=job.id, option=job.option, reason=reason), reason


def _compare_with_others(num_others: int) -> str:
    if not num_others:
        return "the only one to do so"
    return f"ahead of {num_others} other job{'s' * (num_others > 1)} that passed all of them"


def _explain_no_recommendation(ordered: Sequence[Judged]) -> str:
    if not ordered:
        return "there is nothing to compare"
    if any(verdict.outcome == Outcome.undecided for _, verdict in ordered):
        return "no job passed every criterion so far, and some have not ended yet"
    job, verdict = ordered[0]
    missed = [c.name for c in verdict.criteria if c.status != CriterionStatus.passed]
    return (
        f"no job passed every criterion; the best, option {job.option} ({job.id}), "
        f"missed {', '.join(missed)}"
    )
