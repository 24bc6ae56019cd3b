"""The criteria of a verdict: one pure function per criterion, over stored metrics.

A new criterion needs a member of `CriterionName` and a function registered under it; verdicts, the
API, reports, pages and the command line show all registered criteria, in this order. Its finding
says which diagnosis a failure means. A column that `EpochSummary` lacks has to be added there.

Losses of different epochs are compared after re-weighting them to the final β: while β warms up,
the loss as trained is expected to rise. "Final" is the last recorded epoch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.judging.histories import History
from server.models.tables import Job


class CriterionName(StrEnum):
    """The criteria of a verdict."""

    accuracy_in_range = "accuracy_in_range"
    not_mode_collapsed = "not_mode_collapsed"
    kl_per_dimension = "kl_per_dimension"
    loss_decreases = "loss_decreases"
    stable = "stable"
    completed = "completed"


class CriterionStatus(StrEnum):
    passed = "passed"
    failed = "failed"
    no_data = "no_data"


class Diagnosis(StrEnum):
    """What happened to the model, most serious first."""

    undecided = "undecided"
    diverged = "diverged"
    mode_collapse = "mode_collapse"
    posterior_collapse = "posterior_collapse"
    over_painted = "over_painted"
    out_of_range = "out_of_range"
    unstable = "unstable"
    healthy = "healthy"


class Thresholds(BaseModel):
    """The thresholds of the criteria. Changed thresholds also apply to old jobs."""

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
    """A criterion's result for a job, and the epochs it is based on."""

    name: CriterionName
    status: CriterionStatus
    value: float | None
    target: str
    epochs: list[int]
    explanation: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """The input of a criterion: a job, its epochs (oldest first) and the thresholds."""

    job: Job
    epochs: History
    limits: Thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The output of a criterion's function; `has_passed` None means no data."""

    target: str
    #: What happened to the model if this failed; None says nothing about the model.
    diagnosis: Diagnosis | None = None
    has_passed: bool | None = None
    value: float = math.nan
    epochs: list[int] | None = None
    explanation: str = "no data yet"

    @property
    def status(self) -> CriterionStatus:
        if self.has_passed is None:
            return CriterionStatus.no_data
        return CriterionStatus.passed if self.has_passed else CriterionStatus.failed


Rule = Callable[[Evidence], Finding]

#: Every criterion, in the order of display.
CRITERIA: Final[dict[CriterionName, Rule]] = {}


def criterion(name: CriterionName) -> Callable[[Rule], Rule]:
    """Register a function as the criterion of this name."""

    def register(rule: Rule) -> Rule:
        CRITERIA[name] = rule
        return rule

    return register


def judge_criteria(evidence: Evidence) -> dict[CriterionName, Finding]:
    """The answer of every registered criterion."""
    return {name: rule(evidence) for name, rule in CRITERIA.items()}


def describe_criterion(name: CriterionName, finding: Finding) -> Criterion:
    """The answer as it is shown."""
    return Criterion(
        name=name,
        status=finding.status,
        value=finding.value if math.isfinite(finding.value) else None,
        target=finding.target,
        epochs=finding.epochs or [],
        explanation=finding.explanation,
    )


@criterion(CriterionName.accuracy_in_range)
def judge_accuracy(evidence: Evidence) -> Finding:
    """The final training pixel accuracy is between the two thresholds."""
    limits = evidence.limits
    target = f"{limits.min_accuracy:.2f} to {limits.max_accuracy:.2f}"
    if not evidence.epochs:
        return Finding(target=target)
    final = evidence.epochs[-1]
    accuracy = final.train_pixel_accuracy
    is_below = accuracy < limits.min_accuracy
    return Finding(
        target=target,
        diagnosis=Diagnosis.over_painted if is_below else Diagnosis.out_of_range,
        has_passed=limits.min_accuracy <= accuracy <= limits.max_accuracy,
        value=accuracy,
        epochs=[final.epoch],
        explanation=f"final training pixel accuracy {accuracy:.1%}",
    )


@criterion(CriterionName.not_mode_collapsed)
def judge_mode_collapse(evidence: Evidence) -> Finding:
    """In the final epoch the foreground recall is high enough and few validation reconstructions
    are all black."""
    limits, target = evidence.limits, _describe_collapse_target(evidence)
    final = evidence.epochs[-1] if evidence.epochs else None
    if final is None or final.val_foreground_recall is None:
        return Finding(target=target)
    recall, black = final.val_foreground_recall, final.val_all_black_share
    return Finding(
        target=target,
        diagnosis=Diagnosis.mode_collapse,
        has_passed=recall >= limits.min_foreground_recall and black < limits.max_all_black_share,
        value=recall,
        epochs=[final.epoch],
        explanation=f"validation foreground recall {recall:.2f}, {black:.1%} of the "
        "reconstructions all black",
    )


def _describe_collapse_target(evidence: Evidence) -> str:
    limits, summary = evidence.limits, evidence.job.dataset_summary
    target = (
        f"foreground recall at least {limits.min_foreground_recall:.2f} and fewer than "
        f"{limits.max_all_black_share:.0%} of reconstructions all black"
    )
    if summary:
        share = summary["background_share"]
        target += f"; an all-background output would be {share:.1%} accurate"
    return target


@criterion(CriterionName.kl_per_dimension)
def judge_kl(evidence: Evidence) -> Finding:
    """In the final epoch, every latent dimension carries information."""
    limits = evidence.limits
    target = f"every dimension above {limits.min_kl_per_dimension:g} nats"
    if not evidence.epochs:
        return Finding(target=target)
    final = evidence.epochs[-1]
    kl = final.val_kl_per_dimension
    num_active = sum(value > limits.min_kl_per_dimension for value in kl)
    return Finding(
        target=target,
        diagnosis=Diagnosis.posterior_collapse,
        has_passed=num_active == len(kl),
        value=min(kl),
        epochs=[final.epoch],
        explanation=f"{num_active} of {len(kl)} dimensions active, the weakest at "
        f"{min(kl):.3f} nats",
    )


@criterion(CriterionName.loss_decreases)
def judge_loss(evidence: Evidence) -> Finding:
    """The training loss at the final β is finite and falls from each epoch to the next."""
    epochs, tolerance = evidence.epochs, evidence.limits.loss_tolerance
    target = f"each epoch below the one before, within {tolerance:.0%}"
    losses = reweigh(epochs)
    broken = [
        row.epoch for row, loss in zip(epochs, losses, strict=True) if not math.isfinite(loss)
    ]
    if len(epochs) < 2 and not broken:
        return Finding(target=target)
    rises = _compute_rises(losses)
    broken += [
        row.epoch
        for row, rise in zip(epochs[1:], rises, strict=True)
        if math.isfinite(rise) and rise > tolerance
    ]
    return Finding(
        target=target,
        diagnosis=Diagnosis.unstable,
        has_passed=not broken,
        value=max(rises, default=math.nan),
        epochs=broken or [row.epoch for row in epochs],
        explanation=f"the loss, re-weighted to the final β, {_describe_course(rises, broken)}",
    )


def _describe_course(rises: Sequence[float], broken: Sequence[int]) -> str:
    if broken:
        return f"rises in epochs {broken}"
    highest = max(rises)
    return "falls from epoch to epoch" + f", or rises by {highest:.2%} at most" * (highest > 0)


@criterion(CriterionName.stable)
def judge_stability(evidence: Evidence) -> Finding:
    """Accuracy and loss do not jump between epochs, nor does the step loss in the last epoch."""
    epochs, limits = evidence.epochs, evidence.limits
    target = (
        f"accuracy changes of at most {limits.max_accuracy_change:.2f}, loss rises of at most "
        f"{limits.max_loss_rise:.0%}, no step above {limits.max_spike_ratio:g}x the running median"
    )
    if len(epochs) < 2:
        return Finding(target=target)
    changes = [abs(b.train_pixel_accuracy - a.train_pixel_accuracy) for a, b in pairwise(epochs)]
    rises = _compute_rises(reweigh(epochs))
    jumps = [
        row.epoch
        for row, change, rise in zip(epochs[1:], changes, rises, strict=True)
        if not (change <= limits.max_accuracy_change and rise <= limits.max_loss_rise)
    ]
    spike = epochs[-1].max_spike_ratio
    is_spiky = spike is not None and not spike <= limits.max_spike_ratio
    spike_text = "too few steps for spikes" if spike is None else f"largest spike {spike:.2f}x"
    return Finding(
        target=target,
        diagnosis=Diagnosis.unstable,
        has_passed=not jumps and not is_spiky,
        value=max(changes),
        epochs=jumps or [row.epoch for row in epochs],
        explanation=f"largest accuracy change {max(changes):.3f}, largest loss rise "
        f"{max(max(rises), 0.0):.1%}, {spike_text} in the last epoch",
    )


@criterion(CriterionName.completed)
def judge_completion(evidence: Evidence) -> Finding:
    """All planned epochs ran."""
    job = evidence.job
    planned = job.training_config.epochs
    done = evidence.epochs[-1].epoch if evidence.epochs else 0
    target = f"all {planned} planned epochs"
    if not job.status.is_terminal and done < planned:
        return Finding(target=target, explanation=f"{done} so far")
    return Finding(
        target=target,
        has_passed=done >= planned,
        value=done,
        epochs=[done] if done else [],
        explanation=f"{done} of {planned} epochs ran",
    )


def reweigh(epochs: History) -> list[float]:
    """Each epoch's training loss, computed with the last epoch's β."""
    beta = epochs[-1].beta if epochs else 0.0
    return [row.train_recon_loss + beta * row.train_kl_loss for row in epochs]


def _compute_rises(losses: Sequence[float]) -> list[float]:
    """The relative rise from each epoch to the next; falls are negative."""
    return [b / a - 1 if a else math.inf * b if b else 0.0 for a, b in pairwise(losses)]
