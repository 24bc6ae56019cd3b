"""Verdicts: the overall result of a job's criteria. Computed on request and never stored."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, Field
from sqlmodel import Session

from server.judging import evidence_criteria, spec_criteria, training_criteria
from server.judging.criteria import (
    CriteriaSet,
    Criterion,
    CriterionName,
    CriterionStatus,
    Diagnosis,
    Evidence,
    Findings,
    Thresholds,
    describe_criterion,
    judge_criteria,
)
from server.judging.diagnoses import diagnose, has_mode_collapse, summarise
from server.judging.histories import History, read_in_parts
from server.models.tables import Job, JobStatus

#: The modules that register criteria when they are imported.
REGISTERING: Final = (spec_criteria, evidence_criteria, training_criteria)
_MAX_CACHED_VERDICTS: Final = 1000


class Outcome(StrEnum):
    success = "success"
    failure = "failure"
    undecided = "undecided"


class Verdict(BaseModel):
    """A job's criteria with the overall outcome and a diagnosis."""

    job_id: str
    criteria_set: CriteriaSet
    outcome: Outcome
    diagnosis: Diagnosis
    is_mode_collapse: bool = Field(
        description="whether too few objects are painted, by the thresholds of "
        "`not_mode_collapsed` and whichever criteria judge; the diagnosis says why"
    )
    summary: str
    criteria: list[Criterion]

    def list_names(self, status: CriterionStatus) -> list[CriterionName]:
        """The criteria of this status."""
        return [criterion.name for criterion in self.criteria if criterion.status == status]


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a verdict says, without the words."""

    outcome: Outcome
    diagnosis: Diagnosis
    findings: Findings


def judge(
    job: Job,
    epochs: History,
    thresholds: Thresholds | None = None,
    *,
    criteria_set: CriteriaSet = CriteriaSet.spec,
) -> Verdict:
    """Judge a job by its epochs, oldest first."""
    evidence = Evidence(job, epochs, thresholds or Thresholds(), criteria_set)
    return describe_verdict(evidence, assess(evidence))


def describe_verdict(evidence: Evidence, found: Assessment) -> Verdict:
    """The verdict in words."""
    return Verdict(
        job_id=evidence.job.id,
        criteria_set=evidence.criteria_set,
        outcome=found.outcome,
        diagnosis=found.diagnosis,
        is_mode_collapse=has_mode_collapse(evidence),
        summary=summarise(found.diagnosis, evidence, found.findings),
        criteria=[describe_criterion(name, each) for name, each in found.findings.items()],
    )


def assess(evidence: Evidence) -> Assessment:
    """As `judge`, for thousands of jobs whose verdicts nobody reads."""
    findings = judge_criteria(evidence)
    return Assessment(
        outcome=_decide(evidence.job, findings),
        diagnosis=diagnose(evidence, findings),
        findings=findings,
    )


class VerdictCache:
    """Cached verdicts of ended jobs: a job list is read every other second and should not read
    thousands of epochs each time."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._lock = threading.Lock()

    def judge_all(
        self,
        session: Session,
        jobs: Sequence[Job],
        *,
        criteria_set: CriteriaSet = CriteriaSet.spec,
    ) -> dict[str, Verdict]:
        """The verdict of each job by its id, with the default thresholds."""
        keys = {
            job.id: (job.id, job.status, job.attempt, job.epochs_completed, criteria_set)
            for job in jobs
        }
        with self._lock:
            verdicts = {
                job_id: self._verdicts[key] for job_id, key in keys.items() if key in self._verdicts
            }
        unknown = [job for job in jobs if job.id not in verdicts]
        verdicts |= {
            job.id: judge(job, epochs, criteria_set=criteria_set)
            for job, epochs in read_in_parts(session, unknown)
        }
        with self._lock:
            if len(self._verdicts) > _MAX_CACHED_VERDICTS:
                self._verdicts.clear()
            ended = [job.id for job in unknown if job.status.is_terminal]
            self._verdicts.update({keys[job_id]: verdicts[job_id] for job_id in ended})
        return verdicts


def _decide(job: Job, findings: Findings) -> Outcome:
    if not job.status.is_terminal:
        return Outcome.undecided
    passed = {finding.has_passed for finding in findings.values()}
    if job.status != JobStatus.succeeded or False in passed:
        return Outcome.failure
    # One epoch, for example, does not show whether the loss falls.
    return Outcome.undecided if None in passed else Outcome.success
