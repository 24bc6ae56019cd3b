"""Verdicts: the overall result of a job's criteria. Computed on request and never stored."""

import threading
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Final

from pydantic import BaseModel
from sqlmodel import Session

from server.judging.criteria import (
    Criterion,
    CriterionName,
    CriterionStatus,
    Diagnosis,
    Evidence,
    Finding,
    Thresholds,
    describe_criterion,
    judge_criteria,
    reweigh,
)
from server.judging.histories import History, read_histories
from server.models.tables import FailureKind, Job, JobStatus

_MAX_CACHED_VERDICTS: Final = 1000


class Outcome(StrEnum):
    success = "success"
    failure = "failure"
    undecided = "undecided"


_SUMMARIES = {
    Diagnosis.undecided: "There is not enough to judge yet.",
    Diagnosis.diverged: "The loss grew or stopped being a number: training diverged.",
    Diagnosis.mode_collapse: "The model does not distinguish objects from the background: "
    "mode collapse.",
    Diagnosis.posterior_collapse: "Some latent dimensions carry no information: "
    "posterior collapse.",
    Diagnosis.over_painted: "The model finds the objects but paints over the background.",
    Diagnosis.out_of_range: "The model did not collapse, but its accuracy is outside the range.",
    Diagnosis.unstable: "The model learns, but its loss or accuracy jumps between epochs.",
    Diagnosis.healthy: "The model reconstructs objects, uses its latent space and is stable.",
}


class Verdict(BaseModel):
    """A job's criteria with the overall outcome and a diagnosis."""

    job_id: str
    outcome: Outcome
    diagnosis: Diagnosis
    summary: str
    criteria: list[Criterion]

    def list_names(self, status: CriterionStatus) -> list[CriterionName]:
        """The criteria of this status."""
        return [criterion.name for criterion in self.criteria if criterion.status == status]


def judge(job: Job, epochs: History, thresholds: Thresholds | None = None) -> Verdict:
    """Judge a job by its epochs, oldest first."""
    evidence = Evidence(job, epochs, thresholds or Thresholds())
    findings = judge_criteria(evidence)
    diagnosis = _diagnose(evidence, findings.values())
    return Verdict(
        job_id=job.id,
        outcome=_decide(job, findings.values()),
        diagnosis=diagnosis,
        summary=_SUMMARIES[diagnosis],
        criteria=[describe_criterion(name, finding) for name, finding in findings.items()],
    )


class VerdictCache:
    """Cached verdicts of ended jobs: a job list is read every other second and should not read
    thousands of epochs each time."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._lock = threading.Lock()

    def judge_all(self, session: Session, jobs: Sequence[Job]) -> dict[str, Verdict]:
        """The verdict of each job by its id, with the default thresholds."""
        keys = {job.id: (job.id, job.status, job.attempt, job.epochs_completed) for job in jobs}
        with self._lock:
            verdicts = {
                job_id: self._verdicts[key] for job_id, key in keys.items() if key in self._verdicts
            }
        unknown = [job for job in jobs if job.id not in verdicts]
        histories = read_histories(session, [job.id for job in unknown])
        verdicts |= {job.id: judge(job, histories[job.id]) for job in unknown}
        with self._lock:
            if len(self._verdicts) > _MAX_CACHED_VERDICTS:
                self._verdicts.clear()
            ended = [job.id for job in unknown if job.status.is_terminal]
            self._verdicts.update({keys[job_id]: verdicts[job_id] for job_id in ended})
        return verdicts


def _decide(job: Job, findings: Collection[Finding]) -> Outcome:
    statuses = {finding.status for finding in findings}
    if not job.status.is_terminal:
        return Outcome.undecided
    if job.status != JobStatus.succeeded or CriterionStatus.failed in statuses:
        return Outcome.failure
    # One epoch, for example, does not show whether the loss falls.
    return Outcome.undecided if CriterionStatus.no_data in statuses else Outcome.success


def _diagnose(evidence: Evidence, findings: Collection[Finding]) -> Diagnosis:
    """The most serious of what the failed criteria say about the model."""
    if evidence.job.failure_kind == FailureKind.numeric:
        return Diagnosis.diverged
    if not evidence.epochs:
        return Diagnosis.undecided
    if _has_diverged(evidence):
        return Diagnosis.diverged
    failed = [f.diagnosis for f in findings if f.status is CriterionStatus.failed and f.diagnosis]
    if failed:
        return min(failed, key=list(Diagnosis).index)
    is_open = any(finding.status is CriterionStatus.no_data for finding in findings)
    return Diagnosis.undecided if is_open else Diagnosis.healthy


def _has_diverged(evidence: Evidence) -> bool:
    """Whether the last epoch's loss is above the first one's, or not a number."""
    losses = reweigh(evidence.epochs)
    return not losses[-1] <= losses[0] * (1 + evidence.limits.loss_tolerance)
