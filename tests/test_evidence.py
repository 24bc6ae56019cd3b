"""Criteria of what a model knows, each at its threshold."""

from typing import Any

import pytest
from artificial_runs import (
    BLACK,
    find,
    history,
    make_epoch,
    make_job,
    make_measured_epoch,
    measured_history,
)

from server.judging.criteria import (
    CriteriaSet,
    Criterion,
    CriterionStatus,
    Diagnosis,
    Thresholds,
    list_criteria,
)
from server.judging.verdicts import Outcome, Verdict, judge
from server.models.epochs import EpochMetrics
from server.models.tables import JobStatus

PASSED, FAILED, NO_DATA = CriterionStatus.passed, CriterionStatus.failed, CriterionStatus.no_data
NEVER = CriterionStatus.not_applicable
NEW = ("informative", "separates_foreground", "knows_colours", "paints_truthfully")


def judge_final(name: str, *, limits: dict[str, float] | None = None, **values: Any) -> Criterion:
    """The answer of a criterion about a run whose last epoch has these values."""
    return find(
        name,
        make_job(),
        measured_history(**values),
        criteria_set=CriteriaSet.evidence,
        **limits or {},
    )


def judge_by_evidence(
    metrics: list[EpochMetrics], status: JobStatus = JobStatus.succeeded
) -> Verdict:
    return judge(make_job(status), metrics, criteria_set=CriteriaSet.evidence)


def test_model_that_knows_and_paints_enough_passes() -> None:
    verdict = judge_by_evidence(measured_history())
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.success, Diagnosis.healthy)
    assert verdict.criteria_set == CriteriaSet.evidence
    assert [each.name for each in verdict.criteria] == list_criteria(CriteriaSet.evidence)


@pytest.mark.parametrize(
    ("information", "num_active", "status"),
    [
        (1.0, 2, PASSED),
        (0.999, 2, FAILED),
        (1.0, 1, PASSED),
        (1.0, 0, FAILED),
        (None, 2, NEVER),
    ],
)
def test_informative(information: float | None, num_active: int, status: CriterionStatus) -> None:
    criterion = judge_final(
        "informative", val_mutual_information=information, val_active_units_variance=num_active
    )
    assert criterion.status == status
    assert criterion.value == information


def test_kl_is_no_information() -> None:
    """A run that diverged had 22 nats in its dimensions, and nothing of them about the grid."""
    known = {"val_kl_per_dimension": [22.0] * 10, "val_mutual_information": 0.0}
    metrics = measured_history(**known, val_active_units_variance=10)
    assert find("kl_per_dimension", make_job(), metrics).status == PASSED
    verdict = judge_by_evidence(metrics)
    assert verdict.diagnosis == Diagnosis.posterior_collapse
    assert "0.00 nats of mutual information" in verdict.summary


@pytest.mark.parametrize(
    ("precision", "prevalence", "status"),
    [
        (0.21, 0.07, PASSED),
        (0.2099, 0.07, FAILED),
        (None, 0.07, NEVER),
        (None, 0.0, NEVER),
        # Three times 0.4 is more than there is; half of the way from 0.4 to 1 is 0.7.
        (0.7, 0.4, PASSED),
        (0.6999, 0.4, FAILED),
    ],
)
@pytest.mark.parametrize("kind", ["foreground", "colour"])
def test_average_precision_is_compared_with_that_of_random_scores(
    precision: float | None, prevalence: float, status: CriterionStatus, kind: str
) -> None:
    name = "separates_foreground" if kind == "foreground" else "knows_colours"
    columns = ("val_foreground_ap", "val_foreground_share")
    if kind == "colour":
        columns = ("val_colour_ap", "val_colour_prevalence")
    criterion = judge_final(name, **dict(zip(columns, (precision, prevalence), strict=True)))
    assert criterion.status == status
    assert criterion.value == precision


@pytest.mark.parametrize(
    ("painted", "precision", "recall", "status"),
    [
        (0.14, 0.3, 0.6, PASSED),
        (0.1401, 0.3, 0.6, FAILED),
        (0.035, 0.9, 0.45, PASSED),
        (0.0349, 0.9, 0.45, FAILED),
        (0.07, 0.2999, 0.6, FAILED),
        (0.07, 0.3, 0.6, PASSED),
        (0.0, None, 0.0, FAILED),
        (0.07, None, None, FAILED),
    ],
)
def test_paints_truthfully(
    painted: float, precision: float | None, recall: float | None, status: CriterionStatus
) -> None:
    criterion = judge_final(
        "paints_truthfully",
        val_background_share=1 - painted,
        val_foreground_precision=precision,
        val_foreground_recall=recall,
    )
    assert criterion.status == status
    assert criterion.value == pytest.approx(painted / 0.07)


def test_without_foreground_nothing_about_it_is_judged() -> None:
    nothing = dict.fromkeys(
        ["val_foreground_recall", "val_foreground_precision", "val_foreground_ap", "val_colour_ap",
         "val_colour_prevalence"]
    )  # fmt: skip
    metrics = measured_history(val_foreground_share=0.0, **nothing)
    for name in ("separates_foreground", "knows_colours", "paints_truthfully"):
        criterion = find(name, make_job(), metrics, criteria_set=CriteriaSet.evidence)
        assert criterion.status == NEVER
        assert "no foreground" in criterion.explanation


@pytest.mark.parametrize(
    ("train", "val", "status"),
    [
        (0.2, 0.22, PASSED),
        (0.2, 0.2201, FAILED),
        (0.2, 0.1, PASSED),
        (0.0, 0.0, PASSED),
        (-0.2, -0.18, PASSED),
        (-0.2, -0.17, FAILED),
    ],
)
def test_generalises(train: float, val: float, status: CriterionStatus) -> None:
    criterion = judge_final("generalises", train_recon_loss=train, val_recon_loss=val)
    assert criterion.status == status


@pytest.mark.parametrize(
    ("name", "limits", "values"),
    [
        ("informative", {"min_mutual_information": 9}, {}),
        ("informative", {"max_inactive_units": 0}, {"val_active_units_variance": 1}),
        ("separates_foreground", {"min_foreground_ap_ratio": 7.5}, {}),
        ("knows_colours", {"min_colour_ap_ratio": 55}, {}),
        ("paints_truthfully", {"max_painted_ratio": 1.2}, {}),
        ("paints_truthfully", {"min_precision_to_recall": 0.7}, {}),
        ("generalises", {"max_generalisation_gap": 0.0}, {"val_recon_loss": 0.31}),
    ],
)
def test_each_threshold_decides_its_criterion(
    name: str, limits: dict[str, float], values: dict[str, Any]
) -> None:
    assert judge_final(name, **values).status == PASSED
    assert judge_final(name, limits=limits, **values).status == FAILED


def test_old_run_is_undecided_and_says_why() -> None:
    """It was trained before anybody measured what a model knows."""
    verdict = judge_by_evidence([make_epoch(epoch) for epoch in (1, 2, 3)])
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.undecided, Diagnosis.undecided)
    answers = {each.name: each for each in verdict.criteria}
    for name in NEW:
        assert answers[name].status == NO_DATA
        assert answers[name].explanation == "the job is older than this measure"
    reason = f"{', '.join(NEW)} (the job is older than this measure)"
    assert verdict.summary == f"Nothing failed, but there is no data for {reason}."


@pytest.mark.parametrize("criteria_set", CriteriaSet)
@pytest.mark.parametrize("num_epochs", [0, 1, 2, 3])
@pytest.mark.parametrize("status", JobStatus)
def test_old_run_is_never_an_error(
    status: JobStatus, num_epochs: int, criteria_set: CriteriaSet
) -> None:
    for metrics in (history(**BLACK), [make_epoch(epoch) for epoch in (1, 2, 3)]):
        verdict = judge(make_job(status), metrics[:num_epochs], criteria_set=criteria_set)
        assert verdict.summary


def test_run_that_was_continued_after_the_upgrade_is_judged_by_its_last_epoch() -> None:
    metrics = [make_epoch(1), make_epoch(2), make_measured_epoch(3)]
    assert judge_by_evidence(metrics).outcome == Outcome.success


def test_old_run_that_failed_a_criterion_that_it_has_data_for_has_failed() -> None:
    metrics = [make_epoch(epoch, val_recon_loss=2.0) for epoch in (1, 2, 3)]
    verdict = judge_by_evidence(metrics)
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.failure, Diagnosis.overfitted)


def test_thresholds_of_one_set_may_be_given_for_the_other() -> None:
    limits = Thresholds(min_accuracy=0.9, max_accuracy=1, min_mutual_information=100)
    by_spec = judge(make_job(), [make_epoch(epoch) for epoch in (1, 2, 3)], limits)
    assert {each.name for each in by_spec.criteria} == set(list_criteria(CriteriaSet.spec))
