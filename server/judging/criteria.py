"""What a criterion of a verdict is: its name, its sets, its thresholds, and where it is registered.

A new criterion needs a member of `CriterionName` and a function registered under it with the sets
that it belongs to; verdicts, the API, reports, pages and the command line show all criteria of a
set, in the order of their names. Its finding says which diagnosis a failure means. A column that
`EpochSummary` lacks has to be added there. The functions are in `spec_criteria`,
`evidence_criteria` and `training_criteria`, which `verdicts` imports.

"Final" is the last recorded epoch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.judging.histories import EpochSummary, History
from server.models.configuration import NEGLIGIBLE_LOSS, TrainingConfig, count_steps
from server.models.epochs import EpochMetrics
from server.models.tables import FailureKind, Job, JobStatus

#: A value that differs from its threshold by no more than rounding is equal to it: relative to
#: them, and for a threshold of 0.
_ROUNDING: Final = 1e-9
_ROUNDING_AT_ZERO: Final = 1e-12


class CriteriaSet(StrEnum):
    """A named set of criteria, by which a job is judged."""

    spec = "spec"  #: what was asked for: the accuracy, the collapse and the KL of what is painted
    evidence = "evidence"  #: what the model knows, wherever argmax draws the line


class CriterionName(StrEnum):
    """The criteria of all sets, in the order of display."""

    accuracy_in_range = "accuracy_in_range"
    not_mode_collapsed = "not_mode_collapsed"
    kl_per_dimension = "kl_per_dimension"
    informative = "informative"
    separates_foreground = "separates_foreground"
    knows_colours = "knows_colours"
    paints_truthfully = "paints_truthfully"
    generalises = "generalises"
    loss_decreases = "loss_decreases"
    stable = "stable"
    completed = "completed"


class CriterionStatus(StrEnum):
    passed = "passed"
    failed = "failed"
    no_data = "no_data"  #: not yet, or not of a job that is older than the measure
    not_applicable = "not_applicable"  #: nor will it ever have: the explanation says why


class Diagnosis(StrEnum):
    """What happened to the model. The order is that of seriousness: of several failed criteria the
    most serious one says what happened."""

    undecided = "undecided"  #: there is not enough to judge
    unfinished = "unfinished"  #: the job ended early, through no fault of its loss
    diverged = "diverged"  #: the loss grew, or stopped being a number
    too_short = "too_short"  #: it failed, in fewer steps than any option needs
    posterior_collapse = "posterior_collapse"  #: the latent says nothing about the grid
    decision_collapse = "decision_collapse"  #: the latent says much, and argmax paints background
    mode_collapse = "mode_collapse"  #: objects are not painted; which kind is not known
    under_informed = "under_informed"  #: the model knows something, but less than asked
    over_painted = "over_painted"  #: objects are found, and much of the background is painted too
    overfitted = "overfitted"  #: grids of the training split are reconstructed better than others
    out_of_range = "out_of_range"  #: no collapse, but a value is not as asked
    unstable = "unstable"  #: the loss or the accuracy jumps
    healthy = "healthy"  #: every criterion passed


class Thresholds(BaseModel):
    """The thresholds of the criteria of all sets. Changed thresholds also apply to old jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_accuracy: float = Field(default=0.70, ge=0, le=1)
    max_accuracy: float = Field(default=0.85, ge=0, le=1)
    min_foreground_recall: float = Field(default=0.30, ge=0, le=1)
    max_all_black_share: float = Field(default=0.5, ge=0, le=1)
    min_kl_per_dimension: float = Field(default=0.05, ge=0, le=1000, description="nats")
    min_mutual_information: float = Field(
        default=1.0, ge=0, le=1000, description="nats, of grid and latent"
    )
    max_inactive_units: int = Field(
        default=1, ge=0, le=256, description="latent dimensions whose μ varies too little"
    )
    min_foreground_ap_ratio: float = Field(
        default=3.0,
        ge=1,
        le=1000,
        description="average precision of the foreground, over its share of the cells",
    )
    min_colour_ap_ratio: float = Field(
        default=3.0,
        ge=1,
        le=1000,
        description="mean average precision of the colours, over their mean share of the cells",
    )
    max_painted_ratio: float = Field(
        default=2.0,
        ge=1,
        le=1000,
        description="painted share of the cells over the share of the foreground, or the inverse",
    )
    min_precision_to_recall: float = Field(
        default=0.5, ge=0, le=1, description="precision of the foreground, over its recall"
    )
    max_generalisation_gap: float = Field(
        default=0.10,
        ge=0,
        le=10,
        description="reconstruction loss of validation over that of training, less 1",
    )
    loss_tolerance: float = Field(default=0.01, ge=0, le=10)
    max_accuracy_change: float = Field(default=0.10, ge=0, le=1)
    max_loss_rise: float = Field(default=0.10, ge=0, le=10)
    max_spike_ratio: float = Field(default=3.0, ge=1, le=1000)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_accuracy > self.max_accuracy:
            raise ValueError("min_accuracy must not be above max_accuracy")
        return self


def list_changed(thresholds: Thresholds) -> dict[str, float]:
    """Those that differ from the defaults."""
    return thresholds.model_dump(exclude_defaults=True)


def read_thresholds(stored: Mapping[str, float]) -> Thresholds:
    """Stored thresholds; another version's that this one does not know or take are left out."""
    try:
        return Thresholds.model_validate(stored)
    except ValidationError as error:
        refused = {str(part) for item in error.errors() for part in item["loc"]}
    known = {name: value for name, value in stored.items() if name not in refused}
    return Thresholds.model_validate(known) if refused else Thresholds()


def read_criteria_set(stored: str) -> CriteriaSet:
    """A stored set of criteria; those of the specification in place of one of a later version."""
    return CriteriaSet(stored) if stored in set(CriteriaSet) else CriteriaSet.spec


class Criterion(BaseModel):
    """A criterion's result for a job, and the epochs it is based on."""

    name: CriterionName
    status: CriterionStatus
    value: float | None
    target: str
    epochs: list[int]
    explanation: str


@dataclass(frozen=True)
class Evidence:
    """The input of a criterion: a job, its epochs (oldest first), the thresholds, and the set of
    criteria that judges."""

    job: Job
    epochs: History
    limits: Thresholds
    criteria_set: CriteriaSet = CriteriaSet.spec

    @cached_property
    def config(self) -> TrainingConfig:
        return self.job.training_config

    @property
    def final(self) -> EpochSummary | EpochMetrics | None:
        """The last recorded epoch."""
        return self.epochs[-1] if self.epochs else None

    @property
    def is_older_than_measures(self) -> bool:
        """Whether the job was trained before it was measured what a model knows."""
        return self.final is not None and self.final.val_active_units_variance is None

    @property
    def says_nothing(self) -> bool:
        """Whether the latent is known to say less about the grid than asked."""
        information = self.final.val_mutual_information if self.final else None
        limit = self.limits.min_mutual_information
        return information is not None and not is_at_least(information, limit)

    @property
    def lost_epoch(self) -> int | None:
        """The epoch that was not recorded, because its loss stopped being a number."""
        job = self.job
        if job.status != JobStatus.failed or job.failure_kind != FailureKind.numeric:
            return None
        return self.final.epoch + 1 if self.final else 1

    @property
    def lacks_foreground(self) -> bool:
        """Whether the validation split has no foreground to be found."""
        return self.final is not None and self.final.val_foreground_recall is None

    @property
    def num_steps(self) -> int | None:
        """The steps that the job plans; None before it has read its data."""
        num_train = (self.job.dataset_summary or {}).get("num_train")
        if not num_train:
            return None
        epochs, batch_size = self.config.epochs, self.config.batch_size
        return count_steps(num_train, epochs=epochs, batch_size=batch_size)


NO_DATA_YET: Final = "no data yet"
NO_FOREGROUND: Final = "the validation split has no foreground"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The output of a criterion's function; `has_passed` None means no data."""

    target: str
    #: What happened to the model if this failed.
    diagnosis: Diagnosis = Diagnosis.out_of_range
    has_passed: bool | None = None
    value: float = math.nan
    epochs: list[int] | None = None
    explanation: str = NO_DATA_YET
    #: Whether there will never be data, for the reason in the explanation.
    is_not_applicable: bool = False

    @property
    def status(self) -> CriterionStatus:
        if self.has_passed is None:
            never = self.is_not_applicable
            return CriterionStatus.not_applicable if never else CriterionStatus.no_data
        return CriterionStatus.passed if self.has_passed else CriterionStatus.failed


Rule = Callable[[Evidence], Finding]
Findings = dict[CriterionName, Finding]


@dataclass(frozen=True, slots=True)
class RegisteredCriterion:
    rule: Rule
    sets: frozenset[CriteriaSet]


#: Every criterion by its name.
CRITERIA: Final[dict[CriterionName, RegisteredCriterion]] = {}


def criterion(name: CriterionName, *sets: CriteriaSet) -> Callable[[Rule], Rule]:
    """Register a function as the criterion of this name, in these sets."""

    def register(rule: Rule) -> Rule:
        CRITERIA[name] = RegisteredCriterion(rule, frozenset(sets))
        return rule

    return register


def list_criteria(criteria_set: CriteriaSet) -> list[CriterionName]:
    """The criteria of a set, in the order of display."""
    return [
        name for name in CriterionName if name in CRITERIA and criteria_set in CRITERIA[name].sets
    ]


def judge_criteria(evidence: Evidence) -> Findings:
    """The answer of every criterion of a set."""
    return {
        name: _settle(CRITERIA[name].rule(evidence), evidence)
        for name in list_criteria(evidence.criteria_set)
    }


def _settle(finding: Finding, evidence: Evidence) -> Finding:
    """A job that has ended waits for nothing."""
    is_waiting = finding.has_passed is None and finding.explanation == NO_DATA_YET
    if not is_waiting or not evidence.job.status.is_terminal:
        return finding
    return replace(
        finding, is_not_applicable=True, explanation="the job ended before there was any data"
    )


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


# -- comparing with thresholds: nothing holds of a value that is NaN or infinite


def is_at_most(value: float, limit: float) -> bool:
    return _are_finite(value, limit) and (value <= limit or _are_equal(value, limit))


def is_at_least(value: float, limit: float) -> bool:
    return _are_finite(value, limit) and (value >= limit or _are_equal(value, limit))


def is_below(value: float, limit: float) -> bool:
    return _are_finite(value, limit) and value < limit and not _are_equal(value, limit)


def is_above(value: float, limit: float) -> bool:
    return _are_finite(value, limit) and value > limit and not _are_equal(value, limit)


def compute_rise(before: float, loss: float) -> float:
    """The relative rise of a loss; falls are negative. A change between two losses of almost
    nothing is none."""
    if _are_negligible(before, loss):
        return 0.0
    return (loss - before) / max(abs(before), NEGLIGIBLE_LOSS)


def rises_at_most(before: float, loss: float, *, share: float) -> bool:
    """Compared as losses: the relative rise itself loses half of its digits near 0."""
    if _are_negligible(before, loss):
        return True
    return is_at_most(loss, before + share * max(abs(before), NEGLIGIBLE_LOSS))


def _are_negligible(before: float, loss: float) -> bool:
    return abs(before) <= NEGLIGIBLE_LOSS and abs(loss) <= NEGLIGIBLE_LOSS


def _are_finite(value: float, limit: float) -> bool:
    return math.isfinite(value) and math.isfinite(limit)


def _are_equal(value: float, limit: float) -> bool:
    return math.isclose(value, limit, rel_tol=_ROUNDING, abs_tol=_ROUNDING_AT_ZERO)
