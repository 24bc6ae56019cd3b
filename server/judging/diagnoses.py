"""Diagnoses: what happened to the model, in one word and in a sentence.

What the latent says comes first: what is painted counts only where there is something to paint
from.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from server.judging.criteria import (
    CriteriaSet,
    CriterionName,
    CriterionStatus,
    Diagnosis,
    Evidence,
    Finding,
    Findings,
)
from server.judging.painting import Painting
from server.judging.training_criteria import has_diverged
from server.models.tables import FailureKind, JobStatus

#: With fewer steps, no option passes a set of criteria. `docs/reference/criteria.md` says how that
#: was measured.
MIN_NUM_STEPS: Final[Mapping[CriteriaSet, int]] = {
    CriteriaSet.spec: 1000,
    CriteriaSet.evidence: 500,
}

_FAILURES: Final[Mapping[FailureKind | None, str]] = {
    FailureKind.oom: "ran out of memory",
    FailureKind.timeout: "took too long",
    FailureKind.infrastructure: "was lost by its machine",
}

Sentence = Callable[[Evidence, Findings], str]


def diagnose(evidence: Evidence, findings: Findings) -> Diagnosis:
    """The most serious of what is known about the model."""
    if evidence.lost_epoch is not None:
        return Diagnosis.diverged
    if evidence.job.status in (JobStatus.failed, JobStatus.cancelled):
        return Diagnosis.unfinished
    if evidence.final is None:
        return Diagnosis.undecided
    if has_diverged(evidence):
        return Diagnosis.diverged
    failed = {finding.diagnosis for finding in _list_failed(findings).values()}
    if failed and _is_too_short(evidence):
        return Diagnosis.too_short
    if evidence.says_nothing:  # whichever criteria judge
        failed.add(Diagnosis.posterior_collapse)
    if failed:
        return min(failed, key=list(Diagnosis).index)
    is_open = any(each.has_passed is None for each in findings.values())
    return Diagnosis.undecided if is_open else Diagnosis.healthy


def has_mode_collapse(evidence: Evidence) -> bool:
    """Whether too few objects are painted, for whatever reason and whichever criteria judge."""
    painting = Painting.of(evidence)
    return painting is not None and painting.has_collapsed(evidence.limits)


def summarise(diagnosis: Diagnosis, evidence: Evidence, findings: Findings) -> str:
    """What the diagnosis means for this job, in a sentence or two."""
    return _SENTENCES[diagnosis](evidence, findings)


def _is_too_short(evidence: Evidence) -> bool:
    least = MIN_NUM_STEPS[evidence.criteria_set]
    return evidence.num_steps is not None and evidence.num_steps < least


def _list_failed(findings: Findings) -> dict[CriterionName, Finding]:
    return {n: each for n, each in findings.items() if each.status is CriterionStatus.failed}


# -- sentences


def _describe_undecided(evidence: Evidence, findings: Findings) -> str:
    if not evidence.job.status.is_terminal or evidence.final is None:
        return "There is not enough to judge yet."
    lacking = defaultdict(list)
    for name, each in findings.items():
        if each.has_passed is None:
            lacking[each.explanation].append(name)
    reasons = [f"{', '.join(names)} ({reason})" for reason, names in lacking.items()]
    return f"Nothing failed, but there is no data for {'; '.join(reasons)}."


def _describe_unfinished(evidence: Evidence, _: Findings) -> str:
    job = evidence.job
    done = evidence.final.epoch if evidence.final else 0
    planned = evidence.config.epochs
    if job.status == JobStatus.cancelled:
        ending = "was cancelled"
    else:
        ending = _FAILURES.get(job.failure_kind, "failed")
    return (
        f"The job {ending} after {done} of {planned} epochs, which says nothing about its loss. "
        "Its criteria are those of the epochs so far."
    )


def _describe_divergence(evidence: Evidence, _: Findings) -> str:
    if evidence.lost_epoch is None:
        return "The loss ended above where it began: training diverged."
    return f"The loss stopped being a number in epoch {evidence.lost_epoch}: training diverged."


def _describe_shortness(evidence: Evidence, findings: Findings) -> str:
    return (
        f"The training has {evidence.num_steps:,} steps, and below "
        f"{MIN_NUM_STEPS[evidence.criteria_set]:,} every option fails. What failed "
        f"({', '.join(_list_failed(findings))}) says nothing about the loss."
    )


def _show_information(evidence: Evidence) -> str:
    assert evidence.final is not None and evidence.final.val_mutual_information is not None
    return f"{evidence.final.val_mutual_information:.2f} nats of mutual information"


def _describe_posterior_collapse(evidence: Evidence, _: Findings) -> str:
    return (
        f"The latent says almost nothing about the grid, {_show_information(evidence)}: posterior "
        "collapse."
    )


def _describe_decision_collapse(evidence: Evidence, _: Findings) -> str:
    text = (
        f"The latent says much about the grid, {_show_information(evidence)}, but almost "
        "everything is painted as background: decision collapse."
    )
    final = evidence.final
    if final is None or final.val_matched_recall is None or final.val_matched_iou is None:
        return text
    return (
        f"{text} If as many cells are painted as there is foreground, the same weights reach a "
        f"foreground recall of {final.val_matched_recall:.2f} and an IoU of "
        f"{final.val_matched_iou:.2f}."
    )


def _describe_mode_collapse(evidence: Evidence, _: Findings) -> str:
    text = "Few cells of the objects are painted in their colours: mode collapse."
    if evidence.final is None or evidence.final.val_mutual_information is None:
        return f"{text} Whether the latent knows more cannot be told: it was not measured."
    return f"{text} Enough cells are painted, but in wrong colours or places."


def _describe_over_painting(evidence: Evidence, _: Findings) -> str:
    painting = Painting.of(evidence)
    assert painting is not None and painting.recall is not None
    assert painting.foreground_share is not None
    return (
        f"The model finds objects, with a recall of {painting.recall:.2f}, but paints over the "
        f"background: {painting.painted_share:.1%} of the cells, where "
        f"{painting.foreground_share:.1%} are foreground."
    )


def _explain(headline: str, *diagnoses: Diagnosis) -> Sentence:
    """A sentence that ends with what the criteria say that failed by one of these diagnoses."""

    def describe(_: Evidence, findings: Findings) -> str:
        reasons = [
            each.explanation
            for each in _list_failed(findings).values()
            if each.diagnosis in diagnoses
        ]
        return f"{headline}: {'; '.join(reasons)}."

    return describe


_SENTENCES: Final[dict[Diagnosis, Sentence]] = {
    Diagnosis.undecided: _describe_undecided,
    Diagnosis.unfinished: _describe_unfinished,
    Diagnosis.diverged: _describe_divergence,
    Diagnosis.too_short: _describe_shortness,
    Diagnosis.posterior_collapse: _describe_posterior_collapse,
    Diagnosis.decision_collapse: _describe_decision_collapse,
    Diagnosis.mode_collapse: _describe_mode_collapse,
    Diagnosis.under_informed: _explain("The model knows less than asked", Diagnosis.under_informed),
    Diagnosis.over_painted: _describe_over_painting,
    Diagnosis.overfitted: _explain(
        "Grids of the training split are reconstructed better than others", Diagnosis.overfitted
    ),
    Diagnosis.out_of_range: _explain(
        "The model did not collapse, but not all is as asked", Diagnosis.out_of_range
    ),
    Diagnosis.unstable: _explain("The training did not settle", Diagnosis.unstable),
    Diagnosis.healthy: lambda *_: "Every criterion passed.",
}
