"""Each criterion at its threshold, and verdicts for artificial histories."""

import math

import pytest
from artificial_runs import (
    BLACK,
    HEALTHY_LOSSES,
    find,
    history,
    make_epoch,
    make_job,
    make_measured_epoch,
    measured_history,
)
from pydantic import ValidationError

from server.judging.criteria import (
    CriteriaSet,
    CriterionStatus,
    Diagnosis,
    Thresholds,
)
from server.judging.verdicts import Outcome, judge
from server.models.tables import TERMINAL_STATUSES, FailureKind, JobStatus

NAN = math.nan
NO_NUMBERS = (NAN, math.inf, -math.inf)
PASSED, FAILED, NO_DATA = CriterionStatus.passed, CriterionStatus.failed, CriterionStatus.no_data
NEVER = CriterionStatus.not_applicable


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
        (None, 0.0, NEVER),
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
        ([1.0], NEVER, []),
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
        (
            HEALTHY_LOSSES,
            "the reconstruction loss and the loss at the final β fall from epoch to epoch",
        ),
        (
            [1.0, 1.005, 0.8],
            "the reconstruction loss and the loss at the final β fall from epoch to epoch, or rise "
            "by 0.50% at most",
        ),
        (
            [1.0, 1.02, 0.8],
            "the reconstruction loss rises in epochs [2]; the loss, re-weighted to the final β, "
            "rises in epochs [2]",
        ),
    ],
)
def test_loss_is_said_to_fall_only_where_it_does(losses: list[float], words: str) -> None:
    metrics = history(train_recon_loss=losses, train_kl_loss=[0.0] * len(losses))
    explanation = find("loss_decreases", make_job(), metrics).explanation
    assert explanation == words


def test_a_loss_that_rises_only_because_beta_warms_up_decreases() -> None:
    metrics = history(
        beta=[0.0, 0.5, 1.0],
        train_recon_loss=[0.5, 0.45, 0.4],
        train_kl_loss=[0.30, 0.28, 0.25],
        train_loss=[0.5, 0.59, 0.65],
    )
    assert find("loss_decreases", make_job(), metrics).status == PASSED


def test_reconstruction_loss_that_rises_while_the_kl_falls_does_not_decrease() -> None:
    """As in a model that collapses: the re-weighted loss alone falls all the time."""
    metrics = history(train_recon_loss=[0.5, 0.52, 0.54], train_kl_loss=[1.0, 0.5, 0.3])
    criterion = find("loss_decreases", make_job(), metrics)
    assert (criterion.status, criterion.epochs) == (FAILED, [2, 3])
    assert criterion.explanation == "the reconstruction loss rises in epochs [2, 3]"


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
    ],
)
def test_stable(
    accuracies: list[float], losses: list[float], spike: float | None, status: CriterionStatus
) -> None:
    """Between the second and the third epoch."""
    metrics = history(
        train_pixel_accuracy=[0.8, *accuracies],
        train_recon_loss=[1.0, *losses],
        train_kl_loss=[0.0, 0.0, 0.0],
        max_spike_ratio=[None, None, spike],
    )
    assert find("stable", make_job(), metrics).status == status


def test_jump_from_the_first_epoch_in_which_the_model_learns_most_is_not_counted() -> None:
    metrics = history(train_pixel_accuracy=[0.5, 0.8, 0.8], train_recon_loss=[1.0, 2.0, 1.0])
    criterion = find("stable", make_job(), metrics)
    assert (criterion.status, criterion.value) == (PASSED, 0.0)
    assert criterion.explanation.startswith("largest accuracy change 0.000, largest loss rise 0.0%")
    late = history(train_pixel_accuracy=[0.8, 0.8, 0.5])
    assert find("stable", make_job(), late).epochs == [3]


@pytest.mark.parametrize(
    ("spikes", "status"),
    [([9.0], NEVER), ([9.0, None], PASSED), ([9.0, 1.0], PASSED), ([1.0, 9.0], FAILED)],
)
def test_before_a_third_epoch_stable_is_judged_by_the_steps_alone(
    spikes: list[float | None], status: CriterionStatus
) -> None:
    metrics = history(max_spike_ratio=spikes)
    assert find("stable", make_job(), metrics).status == status


@pytest.mark.parametrize("criteria_set", CriteriaSet)
@pytest.mark.parametrize("num_epochs", [0, 1, 3])
def test_loss_that_stopped_being_a_number_neither_decreases_nor_is_stable(
    num_epochs: int, criteria_set: CriteriaSet
) -> None:
    """The epoch in which that happened is not recorded."""
    metrics = [make_measured_epoch(epoch) for epoch in range(1, num_epochs + 1)]
    job = make_job(JobStatus.failed, epochs=5, failure_kind=FailureKind.numeric)
    for name in ("loss_decreases", "stable"):
        criterion = find(name, job, metrics, criteria_set=criteria_set)
        assert (criterion.status, criterion.epochs) == (FAILED, [num_epochs + 1])
        assert f"the loss of epoch {num_epochs + 1}, which was not" in criterion.explanation


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


@pytest.mark.parametrize("criteria_set", CriteriaSet)
def test_job_without_epochs_has_no_data(criteria_set: CriteriaSet) -> None:
    verdict = judge(make_job(JobStatus.queued), [], criteria_set=criteria_set)
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.undecided, Diagnosis.undecided)
    assert {criterion.status for criterion in verdict.criteria} == {NO_DATA}


@pytest.mark.parametrize("criteria_set", CriteriaSet)
@pytest.mark.parametrize("num_epochs", [0, 1, 2])
@pytest.mark.parametrize("status", sorted(TERMINAL_STATUSES))
def test_job_that_has_ended_waits_for_nothing(
    status: JobStatus, num_epochs: int, criteria_set: CriteriaSet
) -> None:
    metrics = measured_history()[:num_epochs]
    verdict = judge(make_job(status), metrics, criteria_set=criteria_set)
    assert NO_DATA not in {criterion.status for criterion in verdict.criteria}
    assert not any("yet" in criterion.explanation for criterion in verdict.criteria)


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ([1e-1, 1e-6, 3e-5, 1e-9, 9e-4], PASSED),
        ([1e-9, 1e-3, 0.0, 1e-3], PASSED),
        ([0.0, 0.0, 0.0], PASSED),
        ([0.0, 2e-3], FAILED),
        ([1e-9, 0.5, 1e-9], FAILED),
    ],
)
def test_change_between_losses_of_almost_nothing_is_none(
    losses: list[float], status: CriterionStatus
) -> None:
    """Grids that were learnt by heart are no divergence."""
    metrics = history(train_recon_loss=losses, train_kl_loss=[0.0] * len(losses))
    assert find("loss_decreases", make_job(), metrics).status == status
    has_diverged = judge(make_job(), metrics).diagnosis == Diagnosis.diverged
    assert has_diverged == (losses[-1] > 1e-3)


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


@pytest.mark.parametrize("scale", [1.0, 0.3, 7.1e-3, 1e4])
def test_rise_of_exactly_the_tolerance_passes(scale: float) -> None:
    rising = [scale, scale * 1.01, scale * 1.01 * 1.01]
    metrics = history(train_recon_loss=rising, train_kl_loss=[0.0] * 3)
    assert find("loss_decreases", make_job(), metrics).status == PASSED
    level = history(train_recon_loss=[0.1 + 0.2, 0.3, 0.1 + 0.2], train_kl_loss=[0.0] * 3)
    assert find("loss_decreases", make_job(), level, loss_tolerance=0).status == PASSED
    jumping = [scale, scale, scale * 1.1]
    metrics = history(train_recon_loss=jumping, train_kl_loss=[0.0] * 3)
    assert find("stable", make_job(), metrics).status == PASSED


@pytest.mark.parametrize("accuracies", [[0.8, 0.8, 0.7], [0.7, 0.7, 0.8], [0.9, 0.9, 0.8]])
def test_change_of_exactly_the_allowed_accuracy_passes(accuracies: list[float]) -> None:
    metrics = history(train_pixel_accuracy=accuracies)
    assert find("stable", make_job(), metrics).status == PASSED


def test_loss_below_zero_falls_if_it_goes_on_falling() -> None:
    """As a loss of one's own may be."""
    falling = history(train_recon_loss=[-1.0, -1.5, -2.0], train_kl_loss=[0.0] * 3)
    assert find("loss_decreases", make_job(), falling).status == PASSED
    rising = history(train_recon_loss=[-1.0, -0.9, -0.8], train_kl_loss=[0.0] * 3)
    assert find("loss_decreases", make_job(), rising).epochs == [2, 3]


@pytest.mark.parametrize("limits", [{"min_accuracy": 0.9}, {"max_accuracy": NAN}, {"nope": 1}])
def test_senseless_thresholds_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Thresholds(**limits)
