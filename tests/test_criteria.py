"""Each criterion at its threshold, and verdicts for artificial histories."""

import math
from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from server.judging.criteria import Criterion, CriterionStatus, Diagnosis, Thresholds
from server.judging.ranking import find_differences, rank
from server.judging.verdicts import Outcome, judge
from server.models.columns import utc_now
from server.models.options import BuiltInOption
from server.models.tables import EpochMetrics, FailureKind, Job, JobStatus

NAN = math.nan
PASSED, FAILED, NO_DATA = CriterionStatus.passed, CriterionStatus.failed, CriterionStatus.no_data


def make_job(status: JobStatus = JobStatus.succeeded, *, epochs: int = 3, **values: Any) -> Job:
    config = {"epochs": epochs} | values.pop("config", {})
    option = values.pop("option", BuiltInOption.b)
    return Job(option=option, config=config, status=status, **values)


def make_epoch(epoch: int = 1, **values: Any) -> EpochMetrics:
    """A healthy epoch; keyword arguments override it."""
    healthy: dict[str, Any] = {
        "job_id": "0" * 12,
        "epoch": epoch,
        "attempt": 1,
        "seconds": 1.0,
        "grids_per_second": 1.0,
        "beta": 1.0,
        "learning_rate": 1e-3,
        "num_loss_spikes": 0,
        "max_spike_ratio": 1.2,
        "train_loss": 1.0 / epoch,
        "train_recon_loss": 0.9 / epoch,
        "train_kl_loss": 0.1 / epoch,
        "train_pixel_accuracy": 0.8,
        "val_foreground_recall": 0.6,
        "val_all_black_share": 0.0,
        "val_kl_per_dimension": [1.0, 2.0],
    }
    return EpochMetrics(**healthy | values)


def history(**series: list[Any]) -> list[EpochMetrics]:
    """Epochs whose columns are the given series, of one length."""
    length = len(next(iter(series.values())))
    return [
        make_epoch(i + 1, **{name: values[i] for name, values in series.items()})
        for i in range(length)
    ]


def find(name: str, job: Job, metrics: list[EpochMetrics], **limits: float) -> Criterion:
    criteria = judge(job, metrics, Thresholds(**limits)).criteria
    return next(criterion for criterion in criteria if criterion.name == name)


@pytest.mark.parametrize(
    ("accuracy", "status"),
    [(0.6999, FAILED), (0.70, PASSED), (0.85, PASSED), (0.8501, FAILED), (NAN, FAILED)],
)
def test_accuracy_in_range(accuracy: float, status: CriterionStatus) -> None:
    metrics = [make_epoch(train_pixel_accuracy=accuracy)]
    assert find("accuracy_in_range", make_job(), metrics).status == status


@pytest.mark.parametrize(
    ("recall", "black", "status"),
    [
        (0.30, 0.0, PASSED),
        (0.2999, 0.0, FAILED),
        (0.6, 0.4999, PASSED),
        (0.6, 0.5, FAILED),
        (NAN, 0.0, FAILED),
        (None, 0.0, NO_DATA),
    ],
)
def test_not_mode_collapsed(recall: float | None, black: float, status: CriterionStatus) -> None:
    metrics = [make_epoch(val_foreground_recall=recall, val_all_black_share=black)]
    job = make_job(dataset_summary={"background_share": 0.9315})
    criterion = find("not_mode_collapsed", job, metrics)
    assert criterion.status == status
    assert "93.2%" in criterion.target or "93.1%" in criterion.target


@pytest.mark.parametrize(
    ("kl", "status", "words"),
    [
        ([0.0501, 3.0], PASSED, "2 of 2"),
        ([0.05, 3.0], FAILED, "1 of 2"),
        ([NAN, 3.0], FAILED, "1 of 2"),
    ],
)
def test_kl_per_dimension(kl: list[float], status: CriterionStatus, words: str) -> None:
    criterion = find("kl_per_dimension", make_job(), [make_epoch(val_kl_per_dimension=kl)])
    assert criterion.status == status
    assert words in criterion.explanation


@pytest.mark.parametrize(
    ("losses", "status", "epochs"),
    [
        ([1.0, 0.9, 0.8], PASSED, [1, 2, 3]),
        ([1.0, 1.0099, 0.8], PASSED, [1, 2, 3]),
        ([1.0, 1.02, 0.8], FAILED, [2]),
        ([1.0, NAN, 0.8], FAILED, [2]),
        ([1.0, 0.9, math.inf], FAILED, [3]),
        ([1.0], NO_DATA, []),
        ([NAN], FAILED, [1]),
    ],
)
def test_loss_decreases(losses: list[float], status: CriterionStatus, epochs: list[int]) -> None:
    metrics = history(train_recon_loss=losses, train_kl_loss=[0.0] * len(losses))
    criterion = find("loss_decreases", make_job(), metrics)
    assert criterion.status == status
    assert criterion.epochs == epochs


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, 0.9, 0.8], "falls from epoch to epoch"),
        ([1.0, 1.005, 0.8], "falls from epoch to epoch, or rises by 0.50% at most"),
        ([1.0, 1.02, 0.8], "rises in epochs [2]"),
    ],
)
def test_loss_is_said_to_fall_only_where_it_does(losses: list[float], words: str) -> None:
    metrics = history(train_recon_loss=losses, train_kl_loss=[0.0] * len(losses))
    explanation = find("loss_decreases", make_job(), metrics).explanation
    assert explanation == f"the loss, re-weighted to the final β, {words}"


def test_a_loss_that_rises_only_because_beta_warms_up_decreases() -> None:
    metrics = history(
        beta=[0.0, 0.5, 1.0],
        train_recon_loss=[0.5, 0.45, 0.4],
        train_kl_loss=[0.30, 0.28, 0.25],
        train_loss=[0.5, 0.59, 0.65],
    )
    assert find("loss_decreases", make_job(), metrics).status == PASSED


@pytest.mark.parametrize(
    ("accuracies", "losses", "spike", "status"),
    [
        ([0.8, 0.7001], [1.0, 0.9], 1.0, PASSED),
        ([0.8, 0.69], [1.0, 0.9], 1.0, FAILED),
        ([0.8, 0.91], [1.0, 0.9], 1.0, FAILED),
        ([0.8, 0.8], [1.0, 1.0999], 1.0, PASSED),
        ([0.8, 0.8], [1.0, 1.11], 1.0, FAILED),
        ([0.8, 0.8], [1.0, 0.9], 3.0, PASSED),
        ([0.8, 0.8], [1.0, 0.9], 3.01, FAILED),
        ([0.8, 0.8], [1.0, 0.9], None, PASSED),
        ([0.8, NAN], [1.0, 0.9], 1.0, FAILED),
        ([0.8, 0.8], [1.0, NAN], 1.0, FAILED),
        ([0.8], [1.0], 1.0, NO_DATA),
    ],
)
def test_stable(
    accuracies: list[float], losses: list[float], spike: float | None, status: CriterionStatus
) -> None:
    metrics = history(
        train_pixel_accuracy=accuracies,
        train_recon_loss=losses,
        train_kl_loss=[0.0] * len(losses),
        max_spike_ratio=[None] * (len(losses) - 1) + [spike],
    )
    assert find("stable", make_job(), metrics).status == status


@pytest.mark.parametrize(
    ("job_status", "num_done", "status"),
    [
        (JobStatus.succeeded, 3, PASSED),
        (JobStatus.failed, 2, FAILED),
        (JobStatus.cancelled, 2, FAILED),
        (JobStatus.running, 2, NO_DATA),
    ],
)
def test_completed(job_status: JobStatus, num_done: int, status: CriterionStatus) -> None:
    metrics = [make_epoch(epoch) for epoch in range(1, num_done + 1)]
    assert find("completed", make_job(job_status, epochs=3), metrics).status == status


BLACK = {"val_foreground_recall": [0.0] * 3, "val_all_black_share": [1.0] * 3}


@pytest.mark.parametrize(
    ("series", "diagnosis"),
    [
        ({"train_pixel_accuracy": [0.89, 0.845, 0.84]}, Diagnosis.healthy),
        ({"train_pixel_accuracy": [0.93] * 3, **BLACK}, Diagnosis.mode_collapse),
        ({"val_kl_per_dimension": [[1.0, 0.01]] * 3}, Diagnosis.posterior_collapse),
        ({"train_pixel_accuracy": [0.5, 0.45, 0.4]}, Diagnosis.over_painted),
        ({"train_pixel_accuracy": [0.9] * 3}, Diagnosis.out_of_range),
        ({"train_recon_loss": [1.0, 2.0, 4.0]}, Diagnosis.diverged),
        ({"train_recon_loss": [1.0, 2.0, NAN]}, Diagnosis.diverged),
        ({"train_recon_loss": [1.0, 0.5, 0.8]}, Diagnosis.unstable),
        ({"train_pixel_accuracy": [0.5, 0.75, 0.8]}, Diagnosis.unstable),
    ],
)
def test_diagnosis_of_a_whole_history(series: dict[str, list[Any]], diagnosis: Diagnosis) -> None:
    verdict = judge(make_job(), history(**series))
    assert verdict.diagnosis == diagnosis
    assert verdict.summary
    expected = Outcome.success if diagnosis == Diagnosis.healthy else Outcome.failure
    assert verdict.outcome == expected


def test_collapse_comes_before_the_posterior_collapse_that_goes_with_it() -> None:
    metrics = history(val_kl_per_dimension=[[0.0, 0.0]] * 3, **BLACK)
    assert judge(make_job(), metrics).diagnosis == Diagnosis.mode_collapse


def test_half_finished_job_is_undecided_but_judged_on_what_there_is() -> None:
    verdict = judge(make_job(JobStatus.running), [make_epoch(1), make_epoch(2)])
    assert verdict.outcome == Outcome.undecided
    statuses = {criterion.name: criterion.status for criterion in verdict.criteria}
    assert statuses["accuracy_in_range"] == PASSED
    assert statuses["completed"] == NO_DATA


def test_cancelled_job_is_a_failure_however_healthy() -> None:
    assert judge(make_job(JobStatus.cancelled), [make_epoch()]).outcome == Outcome.failure


def test_job_of_a_single_epoch_is_undecided_unless_it_failed_a_criterion() -> None:
    verdict = judge(make_job(epochs=1), [make_epoch()])
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.undecided, Diagnosis.undecided)
    collapsed = judge(make_job(epochs=1), history(**{name: s[:1] for name, s in BLACK.items()}))
    assert (collapsed.outcome, collapsed.diagnosis) == (Outcome.failure, Diagnosis.mode_collapse)


def test_job_without_epochs_has_no_data() -> None:
    verdict = judge(make_job(JobStatus.queued), [])
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.undecided, Diagnosis.undecided)
    assert {criterion.status for criterion in verdict.criteria} == {NO_DATA}


def test_job_that_failed_by_its_numbers_has_diverged() -> None:
    job = make_job(JobStatus.failed, failure_kind=FailureKind.numeric)
    assert judge(job, []).diagnosis == Diagnosis.diverged


def test_values_that_are_no_numbers_never_reach_json() -> None:
    metrics = history(
        train_pixel_accuracy=[0.8, NAN], train_recon_loss=[1.0, math.inf], max_spike_ratio=[1, NAN]
    )
    verdict = judge(make_job(), metrics)
    assert "NaN" not in verdict.model_dump_json()
    assert all(c.value is None or math.isfinite(c.value) for c in verdict.criteria)


def test_new_thresholds_change_the_verdict() -> None:
    metrics = [make_epoch(train_pixel_accuracy=0.9)]
    assert find("accuracy_in_range", make_job(), metrics).status == FAILED
    assert find("accuracy_in_range", make_job(), metrics, max_accuracy=0.95).status == PASSED


@pytest.mark.parametrize("limits", [{"min_accuracy": 0.9}, {"max_accuracy": NAN}, {"nope": 1}])
def test_senseless_thresholds_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Thresholds(**limits)


def test_rank_is_by_criteria_then_iou_then_age_and_recommends_the_first_success() -> None:
    now = utc_now()
    collapsed = make_job(id="aaaaaaaaaaaa", option=BuiltInOption.a, val_foreground_iou=0.9)
    good = make_job(id="bbbbbbbbbbbb", val_foreground_iou=0.2, created_at=now)
    better = make_job(id="cccccccccccc", val_foreground_iou=0.3)
    twin = make_job(
        id="dddddddddddd", val_foreground_iou=0.2, created_at=now - timedelta(seconds=1)
    )
    healthy = history(train_recon_loss=[1.0, 0.9, 0.8])
    entries = [(job, judge(job, healthy)) for job in (good, better, twin)]
    entries.append((collapsed, judge(collapsed, history(**BLACK))))
    result = rank(entries)
    assert result.ranking == [better.id, good.id, twin.id, collapsed.id]
    assert result.recommendation is not None
    assert (result.recommendation.job_id, result.recommendation.option) == (better.id, "b")
    assert "passed all 6 criteria" in result.reason
    assert result.reason.endswith("ahead of 2 other jobs that passed all of them")


@pytest.mark.parametrize(
    ("num_jobs", "words"),
    [(1, "the only one to do so"), (2, "ahead of 1 other job that passed all of them")],
)
def test_recommendation_counts_the_others_that_passed(num_jobs: int, words: str) -> None:
    healthy = history(train_recon_loss=[1.0, 0.9, 0.8])
    jobs = [make_job(id=letter * 12) for letter in "ab"[:num_jobs]]
    assert rank([(job, judge(job, healthy)) for job in jobs]).reason.endswith(words)


def test_without_a_success_the_reason_says_what_the_best_missed() -> None:
    job = make_job(option=BuiltInOption.a)
    result = rank([(job, judge(job, history(**BLACK)))])
    assert result.recommendation is None
    assert "not_mode_collapsed" in result.reason


def test_jobs_under_way_are_named_as_the_reason() -> None:
    job = make_job(JobStatus.running)
    result = rank([(job, judge(job, [make_epoch()]))])
    assert result.recommendation is None
    assert "not ended yet" in result.reason


def test_differences_are_the_settings_that_differ() -> None:
    first = make_job(id="a" * 12, option=BuiltInOption.a, config={"beta": 1.0, "seed": 1})
    second = make_job(id="b" * 12, config={"beta": 2.0, "seed": 1})
    assert find_differences([first, second]) == {
        "option": {"a" * 12: "a", "b" * 12: "b"},
        "beta": {"a" * 12: 1.0, "b" * 12: 2.0},
    }
    assert find_differences([first]) == {}
