"""Verdicts: pure functions over stored metrics, computed when asked and never stored.

The loss that is judged from epoch to epoch is re-weighted to the final β: while β warms up, the
loss as trained rises by right. "Final" is the last recorded epoch.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.histories import History
from server.models import FailureKind, Job, JobStatus


class CriterionStatus(StrEnum):
    passed = "passed"
    failed = "failed"
    no_data = "no_data"


class Outcome(StrEnum):
    success = "success"
    failure = "failure"
    undecided = "undecided"


class Diagnosis(StrEnum):
    """What happened to the model, the gravest first."""

    undecided = "undecided"
    diverged = "diverged"
    mode_collapse = "mode_collapse"
    posterior_collapse = "posterior_collapse"
    over_painted = "over_painted"
    out_of_range = "out_of_range"
    unstable = "unstable"
    healthy = "healthy"


_SUMMARIES = {
    Diagnosis.undecided: "There is not enough to judge yet.",
    Diagnosis.diverged: "The loss grew or stopped being a number: training diverged.",
    Diagnosis.mode_collapse: "The model does not tell the objects from the background: "
    "mode collapse.",
    Diagnosis.posterior_collapse: "Some latent dimensions carry no information: "
    "posterior collapse.",
    Diagnosis.over_painted: "The model finds the objects but paints over the background.",
    Diagnosis.out_of_range: "The model did not collapse, but its accuracy is outside the range.",
    Diagnosis.unstable: "The model learns, but its loss or accuracy jumps between epochs.",
    Diagnosis.healthy: "The model reconstructs objects, uses its latent space and is stable.",
}


class Thresholds(BaseModel):
    """Where each criterion passes; new ones re-judge old jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_accuracy: float = Field(default=0.70, ge=0, le=1)
    max_accuracy: float = Field(default=0.85, ge=0, le=1)
    min_foreground_recall: float = Field(default=0.30, ge=0, le=1)
    max_all_black_share: float = Field(default=0.5, ge=0, le=1)
    min_kl_per_dimension: float = Field(default=0.05, ge=0, le=1000, description="nats")
    loss_tolerance: float = Field(default=0.01, ge=0, le=10)
    max_accuracy_change: float = Field(default=0.10, ge=0, le=1)
    max_loss_rise: float = Field(default=0.10, ge=0, le=10)
    max_spike_ratio: float = Field(default=3.0, ge=1, le=1000)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_accuracy > self.max_accuracy:
            raise ValueError("min_accuracy must not be above max_accuracy")
        return self


class Criterion(BaseModel):
    """One test of a job and the epochs on which its answer rests."""

    name: str
    status: CriterionStatus
    value: float | None
    target: str
    epochs: list[int]
    explanation: str


class Verdict(BaseModel):
    job_id: str
    outcome: Outcome
    diagnosis: Diagnosis
    summary: str
    criteria: list[Criterion]


class Recommendation(BaseModel):
    job_id: str
    option: str
    reason: str


class Ranking(BaseModel):
    """Ids from best to worst, and the job to prefer; `reason` says why there is none."""

    ranking: list[str]
    recommendation: Recommendation | None
    reason: str


def judge(job: Job, metrics: History, thresholds: Thresholds | None = None) -> Verdict:
    """Judge a job by its epochs, oldest first."""
    thresholds = thresholds or Thresholds()
    criteria = [
        _judge_accuracy(metrics, limits=thresholds),
        _judge_mode_collapse(metrics, job=job, limits=thresholds),
        _judge_kl(metrics, limits=thresholds),
        _judge_loss(metrics, limits=thresholds),
        _judge_stability(metrics, limits=thresholds),
        _judge_completion(metrics, job=job),
    ]
    diagnosis = _diagnose(job, metrics, criteria=criteria, thresholds=thresholds)
    return Verdict(
        job_id=job.id,
        outcome=_decide(job, criteria),
        diagnosis=diagnosis,
        summary=_SUMMARIES[diagnosis],
        criteria=criteria,
    )


def rank(entries: Sequence[tuple[Job, Verdict]]) -> Ranking:
    """Order by criteria passed, then validation foreground IoU, then the newest first."""
    ordered = sorted(entries, key=_rank_key, reverse=True)
    recommendation, reason = _recommend(ordered)
    return Ranking(
        ranking=[job.id for job, _ in ordered], recommendation=recommendation, reason=reason
    )


def find_differences(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The option and configuration keys in which jobs differ: `{key: {job_id: value}}`."""
    settings = {job.id: {"option": job.option, **job.config} for job in jobs}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    differences = {
        key: {job_id: values.get(key) for job_id, values in settings.items()} for key in keys
    }
    return {
        key: values
        for key, values in differences.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _judge_accuracy(metrics: History, *, limits: Thresholds) -> Criterion:
    target = f"{limits.min_accuracy:.2f} to {limits.max_accuracy:.2f}"
    if not metrics:
        return _no_data("accuracy_in_range", target=target)
    final = metrics[-1]
    accuracy = final.train_pixel_accuracy
    return _answer(
        "accuracy_in_range",
        limits.min_accuracy <= accuracy <= limits.max_accuracy,
        value=accuracy,
        target=target,
        epochs=[final.epoch],
        explanation=f"final training pixel accuracy {accuracy:.1%}",
    )


def _judge_mode_collapse(metrics: History, *, job: Job, limits: Thresholds) -> Criterion:
    name = "not_mode_collapsed"
    target = (
        f"foreground recall at least {limits.min_foreground_recall:.2f} and fewer than "
        f"{limits.max_all_black_share:.0%} of reconstructions all black"
    )
    if job.dataset_summary:
        share = job.dataset_summary["background_share"]
        target += f"; always painting background would be {share:.1%} accurate"
    if not metrics or metrics[-1].val_foreground_recall is None:
        return _no_data(name, target=target)
    final = metrics[-1]
    recall, black = final.val_foreground_recall, final.val_all_black_share
    assert recall is not None
    return _answer(
        name,
        recall >= limits.min_foreground_recall and black < limits.max_all_black_share,
        value=recall,
        target=target,
        epochs=[final.epoch],
        explanation=f"validation foreground recall {recall:.2f}, {black:.1%} of the "
        "reconstructions all black",
    )


def _judge_kl(metrics: History, *, limits: Thresholds) -> Criterion:
    target = f"every dimension above {limits.min_kl_per_dimension:g} nats"
    if not metrics:
        return _no_data("kl_per_dimension", target=target)
    final = metrics[-1]
    kl = final.val_kl_per_dimension
    num_active = sum(value > limits.min_kl_per_dimension for value in kl)
    return _answer(
        "kl_per_dimension",
        num_active == len(kl),
        value=min(kl),
        target=target,
        epochs=[final.epoch],
        explanation=f"{num_active} of {len(kl)} dimensions active, the weakest at "
        f"{min(kl):.3f} nats",
    )


def _judge_loss(metrics: History, *, limits: Thresholds) -> Criterion:
    target = f"each epoch below the one before, within {limits.loss_tolerance:.0%}"
    losses = _reweigh(metrics)
    broken = [m.epoch for m, loss in zip(metrics, losses, strict=True) if not math.isfinite(loss)]
    if len(metrics) < 2 and not broken:
        return _no_data("loss_decreases", target=target)
    rises = _rises(losses)
    broken += [
        m.epoch
        for m, rise in zip(metrics[1:], rises, strict=True)
        if math.isfinite(rise) and rise > limits.loss_tolerance
    ]
    return _answer(
        "loss_decreases",
        not broken,
        value=max(rises, default=math.nan),
        target=target,
        epochs=broken or [m.epoch for m in metrics],
        explanation=f"the loss, re-weighted to the final β, {_describe_course(rises, broken)}",
    )


def _describe_course(rises: Sequence[float], broken: Sequence[int]) -> str:
    if broken:
        return f"rises in epochs {broken}"
    highest = max(rises)
    return "falls from epoch to epoch" + f", or rises by {highest:.2%} at most" * (highest > 0)


def _judge_stability(metrics: History, *, limits: Thresholds) -> Criterion:
    target = (
        f"accuracy changes of at most {limits.max_accuracy_change:.2f}, loss rises of at most "
        f"{limits.max_loss_rise:.0%}, no step above {limits.max_spike_ratio:g}x the running median"
    )
    if len(metrics) < 2:
        return _no_data("stable", target=target)
    changes = [abs(b.train_pixel_accuracy - a.train_pixel_accuracy) for a, b in pairwise(metrics)]
    rises = _rises(_reweigh(metrics))
    final = metrics[-1]
    spike = final.max_spike_ratio
    jumps = [
        m.epoch
        for m, change, rise in zip(metrics[1:], changes, rises, strict=True)
        if not (change <= limits.max_accuracy_change and rise <= limits.max_loss_rise)
    ]
    is_spiky = spike is not None and not spike <= limits.max_spike_ratio
    spike_text = "too few steps for spikes" if spike is None else f"largest spike {spike:.2f}x"
    return _answer(
        "stable",
        not jumps and not is_spiky,
        value=max(changes),
        target=target,
        epochs=jumps or [m.epoch for m in metrics],
        explanation=f"largest accuracy change {max(changes):.3f}, largest loss rise "
        f"{max(max(rises), 0.0):.1%}, {spike_text} in the last epoch",
    )


def _judge_completion(metrics: History, *, job: Job) -> Criterion:
    planned = job.training_config.epochs
    done = metrics[-1].epoch if metrics else 0
    target = f"all {planned} planned epochs"
    if not job.status.is_terminal and done < planned:
        return _no_data("completed", target=target, explanation=f"{done} so far")
    return _answer(
        "completed",
        done >= planned,
        value=done,
        target=target,
        epochs=[done] if done else [],
        explanation=f"{done} of {planned} epochs ran",
    )


def _reweigh(metrics: History) -> list[float]:
    """Each epoch's training loss as it would be at the last epoch's β."""
    beta = metrics[-1].beta if metrics else 0.0
    return [m.train_recon_loss + beta * m.train_kl_loss for m in metrics]


def _rises(losses: Sequence[float]) -> list[float]:
    """The relative rise from each epoch to the next; falls are negative."""
    return [b / a - 1 if a else math.inf * b if b else 0.0 for a, b in pairwise(losses)]


def _answer(
    name: str,
    has_passed: bool,
    *,
    value: float,
    target: str,
    epochs: list[int],
    explanation: str,
) -> Criterion:
    return Criterion(
        name=name,
        status=CriterionStatus.passed if has_passed else CriterionStatus.failed,
        value=value if math.isfinite(value) else None,
        target=target,
        epochs=epochs,
        explanation=explanation,
    )


def _no_data(name: str, *, target: str, explanation: str = "no data yet") -> Criterion:
    return Criterion(
        name=name,
        status=CriterionStatus.no_data,
        value=None,
        target=target,
        epochs=[],
        explanation=explanation,
    )


def _decide(job: Job, criteria: Sequence[Criterion]) -> Outcome:
    if not job.status.is_terminal:
        return Outcome.undecided
    if job.status != JobStatus.succeeded or _find(criteria, CriterionStatus.failed):
        return Outcome.failure
    # One epoch, for example, says nothing of how the loss falls.
    is_open = _find(criteria, CriterionStatus.no_data)
    return Outcome.undecided if is_open else Outcome.success


def _find(criteria: Sequence[Criterion], status: CriterionStatus) -> list[str]:
    return [criterion.name for criterion in criteria if criterion.status == status]


def _diagnose(
    job: Job,
    metrics: History,
    *,
    criteria: Sequence[Criterion],
    thresholds: Thresholds,
) -> Diagnosis:
    failed = set(_find(criteria, CriterionStatus.failed))
    if job.failure_kind == FailureKind.numeric:
        return Diagnosis.diverged
    if not metrics:
        return Diagnosis.undecided
    losses = _reweigh(metrics)
    if not losses[-1] <= losses[0] * (1 + thresholds.loss_tolerance):
        return Diagnosis.diverged
    if "not_mode_collapsed" in failed:
        return Diagnosis.mode_collapse
    if "kl_per_dimension" in failed:
        return Diagnosis.posterior_collapse
    if "accuracy_in_range" in failed:
        is_below = metrics[-1].train_pixel_accuracy < thresholds.min_accuracy
        return Diagnosis.over_painted if is_below else Diagnosis.out_of_range
    if failed & {"stable", "loss_decreases"}:
        return Diagnosis.unstable
    return Diagnosis.undecided if _find(criteria, CriterionStatus.no_data) else Diagnosis.healthy


def _rank_key(entry: tuple[Job, Verdict]) -> tuple[int, float, float]:
    job, verdict = entry
    num_passed = sum(c.status == CriterionStatus.passed for c in verdict.criteria)
    iou = -1.0 if job.val_foreground_iou is None else job.val_foreground_iou
    return num_passed, iou, job.created_at.timestamp()


def _recommend(ordered: Sequence[tuple[Job, Verdict]]) -> tuple[Recommendation | None, str]:
    """The first job that passed every criterion, or why there is none."""
    for job, verdict in ordered:
        if verdict.outcome == Outcome.success:
            iou = "none" if job.val_foreground_iou is None else f"{job.val_foreground_iou:.2f}"
            others = sum(v.outcome == Outcome.success for _, v in ordered) - 1
            against = "the only one to do so" if not others else f"before {others} others by it"
            reason = (
                f"option {job.option} passed all {len(verdict.criteria)} criteria with a "
                f"foreground IoU of {iou}, {against}"
            )
            return Recommendation(job_id=job.id, option=job.option, reason=reason), reason
    if not ordered:
        return None, "there is nothing to compare"
    job, verdict = ordered[0]
    if any(v.outcome == Outcome.undecided for _, v in ordered):
        return None, "no job passed every criterion so far, and some have not ended yet"
    missed = [c.name for c in verdict.criteria if c.status != CriterionStatus.passed]
    return None, (
        f"no job passed every criterion; the best, option {job.option} ({job.id}), "
        f"missed {', '.join(missed)}"
    )
