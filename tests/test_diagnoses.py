"""What happened to a model, in one word and in a sentence."""

import math
from typing import Any

import pytest
from artificial_runs import (
    BLACK,
    HEALTHY_LOSSES,
    MEASURED,
    history,
    make_epoch,
    make_job,
    make_measured_epoch,
    measured_history,
)

from server.judging.criteria import CriteriaSet, Diagnosis, Thresholds
from server.judging.diagnoses import MIN_NUM_STEPS
from server.judging.verdicts import Outcome, Verdict, judge
from server.models.epochs import EpochMetrics
from server.models.tables import FailureKind, JobStatus

NAN = math.nan
SUMMARY = {"background_share": 0.93, "num_train": 80_000}
#: As option c paints.
PAINTED = {"train_pixel_accuracy": [0.3, 0.35, 0.4], "val_background_share": [0.37] * 3}


def diagnose(metrics: list[EpochMetrics], **job: Any) -> Verdict:
    return judge(make_job(dataset_summary=SUMMARY, **job), metrics)


def diagnose_by_evidence(**final: Any) -> Verdict:
    job = make_job(dataset_summary=SUMMARY)
    return judge(job, measured_history(**final), criteria_set=CriteriaSet.evidence)


@pytest.mark.parametrize(
    ("series", "diagnosis"),
    [
        ({"train_pixel_accuracy": [0.89, 0.845, 0.84]}, Diagnosis.healthy),
        ({"train_pixel_accuracy": [0.93] * 3, **BLACK}, Diagnosis.mode_collapse),
        ({"val_kl_per_dimension": [[1.0, 0.01]] * 3}, Diagnosis.under_informed),
        (PAINTED, Diagnosis.over_painted),
        ({"train_pixel_accuracy": [0.9] * 3}, Diagnosis.out_of_range),
        ({"train_recon_loss": [1.0, 2.0, 4.0]}, Diagnosis.diverged),
        ({"train_recon_loss": [1.0, 2.0, NAN]}, Diagnosis.diverged),
        ({"train_recon_loss": [1.0, 0.5, 0.8]}, Diagnosis.unstable),
        ({"train_pixel_accuracy": [0.5, 0.65, 0.8]}, Diagnosis.unstable),
    ],
)
def test_diagnosis_of_a_whole_history_of_an_old_run(
    series: dict[str, list[Any]], diagnosis: Diagnosis
) -> None:
    verdict = diagnose(history(**series))
    assert verdict.diagnosis == diagnosis
    assert verdict.summary
    expected = Outcome.success if diagnosis == Diagnosis.healthy else Outcome.failure
    assert verdict.outcome == expected


@pytest.mark.parametrize(
    ("final", "diagnosis"),
    [
        ({}, Diagnosis.healthy),
        ({"val_mutual_information": 0.1}, Diagnosis.posterior_collapse),
        ({"val_active_units_variance": 0}, Diagnosis.under_informed),
        ({"val_foreground_ap": 0.1}, Diagnosis.under_informed),
        ({"val_colour_ap": 0.01}, Diagnosis.under_informed),
        ({"val_background_share": 0.8, "val_foreground_precision": 0.2}, Diagnosis.over_painted),
        ({"val_background_share": 0.97, "val_foreground_precision": 0.9}, Diagnosis.out_of_range),
        ({"val_recon_loss": 2.0}, Diagnosis.overfitted),
        ({"max_spike_ratio": 9.0}, Diagnosis.unstable),
        ({name: series[0] for name, series in BLACK.items()}, Diagnosis.decision_collapse),
    ],
)
def test_diagnosis_by_evidence(final: dict[str, Any], diagnosis: Diagnosis) -> None:
    verdict = diagnose_by_evidence(**final)
    assert verdict.diagnosis == diagnosis
    assert verdict.outcome == (
        Outcome.success if diagnosis == Diagnosis.healthy else Outcome.failure
    )


# -- the two kinds of mode collapse


def test_latent_that_says_nothing_is_a_posterior_collapse() -> None:
    """Option a with seeds 1 and 2."""
    verdict = diagnose(history(is_measured=True, val_mutual_information=[0.02] * 3, **BLACK))
    assert (verdict.diagnosis, verdict.is_mode_collapse) == (Diagnosis.posterior_collapse, True)
    assert verdict.summary == (
        "The latent says almost nothing about the grid, 0.02 nats of mutual information: posterior "
        "collapse."
    )


def test_latent_that_says_much_while_nothing_is_painted_is_a_decision_collapse() -> None:
    """Option a with seed 0, and cross-entropy."""
    known = {"val_mutual_information": 6.2, "val_matched_recall": 0.17, "val_matched_iou": 0.1}
    metrics = history(is_measured=True, **BLACK)
    metrics[-1] = metrics[-1].model_copy(update=known)
    verdict = diagnose(metrics)
    assert (verdict.diagnosis, verdict.is_mode_collapse) == (Diagnosis.decision_collapse, True)
    assert verdict.summary == (
        "The latent says much about the grid, 6.20 nats of mutual information, but almost "
        "everything is painted as background: decision collapse. If as many cells are painted as "
        "there is foreground, the same weights reach a foreground recall of 0.17 and an IoU of "
        "0.10."
    )


def test_kind_of_collapse_of_an_old_run_is_not_known() -> None:
    metrics = history(val_kl_per_dimension=[[0.0, 0.0]] * 3, **BLACK)
    verdict = diagnose(metrics)
    assert (verdict.diagnosis, verdict.is_mode_collapse) == (Diagnosis.mode_collapse, True)
    assert "it was not measured" in verdict.summary


def test_collapse_that_paints_enough_cells_wrongly_hides_nothing_behind_the_background() -> None:
    metrics = measured_history(val_foreground_recall=0.1, val_background_share=0.92)
    verdict = diagnose(metrics)
    assert (verdict.diagnosis, verdict.is_mode_collapse) == (Diagnosis.mode_collapse, True)
    assert "wrong colours or places" in verdict.summary


@pytest.mark.parametrize(
    "final",
    [
        {"val_foreground_recall": 0.0, "val_background_share": 1.0, "val_all_black_share": 1.0},
        {"val_foreground_recall": 0.03, "val_background_share": 0.996},
        {"val_foreground_recall": 0.5, "val_all_black_share": 0.6},
    ],
)
def test_few_painted_cells_or_many_black_grids_are_a_decision_collapse(
    final: dict[str, Any],
) -> None:
    assert diagnose(measured_history(**final)).diagnosis == Diagnosis.decision_collapse


def test_both_sets_say_whether_objects_are_painted() -> None:
    for criteria_set in CriteriaSet:
        metrics = history(is_measured=True, **BLACK)
        assert judge(make_job(), metrics, criteria_set=criteria_set).is_mode_collapse
        assert not judge(make_job(), measured_history(), criteria_set=criteria_set).is_mode_collapse


def test_latent_that_says_nothing_is_told_whichever_criteria_judge() -> None:
    lenient = Thresholds(min_foreground_recall=0, max_all_black_share=1, max_accuracy=1)
    metrics = history(
        is_measured=True, **BLACK | {"val_all_black_share": [0.9] * 3},
        val_mutual_information=[0.0] * 3,
    )  # fmt: skip
    verdict = judge(make_job(), metrics, lenient)
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.success, Diagnosis.posterior_collapse)


def test_dead_dimension_beside_others_that_say_much_is_no_posterior_collapse() -> None:
    """Option b with seed 0."""
    verdict = diagnose(measured_history(val_kl_per_dimension=[0.038, *([2.0] * 9)]))
    assert (verdict.diagnosis, verdict.outcome) == (Diagnosis.under_informed, Outcome.failure)
    assert verdict.summary == (
        "The model knows less than asked: 9 of 10 dimensions active, the weakest at 0.038 nats."
    )


# -- painting


def test_over_painting_tells_its_numbers() -> None:
    verdict = diagnose(history(is_measured=True, **PAINTED))
    assert verdict.summary == (
        "The model finds objects, with a recall of 0.60, but paints over the background: 63.0% of "
        "the cells, where 7.0% are foreground."
    )


@pytest.mark.parametrize(
    "final",
    [
        {"val_foreground_recall": None, "val_foreground_share": 0.0},
        {"val_foreground_recall": None, "val_foreground_share": None},
        {"val_background_share": 0.9},
    ],
)
def test_low_accuracy_without_foreground_or_painting_is_not_over_painted(
    final: dict[str, Any],
) -> None:
    values = {"train_pixel_accuracy": 0.4, "val_background_share": 0.37} | final
    metrics = [make_epoch(epoch, **values) for epoch in (1, 2, 3)]
    verdict = judge(make_job(dataset_summary={"background_share": 1.0}), metrics)
    if final.get("val_background_share"):
        verdict = diagnose(metrics)
    assert verdict.diagnosis == Diagnosis.out_of_range
    assert "finds objects" not in verdict.summary


# -- jobs that did not finish


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (JobStatus.cancelled, None, "was cancelled"),
        (JobStatus.failed, FailureKind.oom, "ran out of memory"),
        (JobStatus.failed, FailureKind.timeout, "took too long"),
        (JobStatus.failed, FailureKind.infrastructure, "was lost by its machine"),
        (JobStatus.failed, FailureKind.user, "failed"),
        (JobStatus.failed, None, "failed"),
    ],
)
@pytest.mark.parametrize("criteria_set", CriteriaSet)
def test_job_that_stopped_through_no_fault_of_its_loss_is_unfinished_and_not_healthy(
    status: JobStatus, kind: FailureKind | None, words: str, criteria_set: CriteriaSet
) -> None:
    job = make_job(status, epochs=5, failure_kind=kind, dataset_summary=SUMMARY)
    verdict = judge(job, measured_history(), criteria_set=criteria_set)
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.failure, Diagnosis.unfinished)
    assert f"The job {words} after 3 of 5 epochs" in verdict.summary
    assert judge(job, [], criteria_set=criteria_set).diagnosis == Diagnosis.unfinished


def test_job_whose_rows_were_lost_is_unfinished() -> None:
    verdict = diagnose(measured_history(), epochs=5)
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.failure, Diagnosis.unfinished)


@pytest.mark.parametrize("status", [JobStatus.queued, JobStatus.running, JobStatus.paused])
def test_job_that_may_go_on_is_undecided(status: JobStatus) -> None:
    verdict = diagnose(measured_history(), status=status, epochs=5)
    assert (verdict.outcome, verdict.diagnosis) == (Outcome.undecided, Diagnosis.undecided)
    assert verdict.summary == "There is not enough to judge yet."


@pytest.mark.parametrize("num_epochs", [0, 3])
def test_job_that_failed_by_its_numbers_has_diverged(num_epochs: int) -> None:
    metrics = measured_history()[:num_epochs]
    verdict = diagnose(metrics, status=JobStatus.failed, failure_kind=FailureKind.numeric)
    assert verdict.diagnosis == Diagnosis.diverged
    assert f"in epoch {num_epochs + 1}" in verdict.summary


# -- jobs that are too short


def _count_grids(criteria_set: CriteriaSet) -> int:
    """The training grids with which five epochs of batches of 128 have the fewest steps."""
    return 128 * (MIN_NUM_STEPS[criteria_set] // 5)


@pytest.mark.parametrize(
    ("num_train", "criteria_set", "diagnosis"),
    [
        (4_000, CriteriaSet.spec, Diagnosis.too_short),
        *((_count_grids(each) - 128, each, Diagnosis.too_short) for each in CriteriaSet),
        *((_count_grids(each), each, Diagnosis.decision_collapse) for each in CriteriaSet),
        (80_000, CriteriaSet.spec, Diagnosis.decision_collapse),
        (None, CriteriaSet.spec, Diagnosis.decision_collapse),
    ],
)
def test_collapse_in_fewer_steps_than_any_option_needs_says_nothing_about_the_loss(
    num_train: int | None, criteria_set: CriteriaSet, diagnosis: Diagnosis
) -> None:
    job = make_job(epochs=5, dataset_summary={"background_share": 0.93, "num_train": num_train})
    metrics = [
        make_measured_epoch(epoch, **{name: series[0] for name, series in BLACK.items()})
        for epoch in range(1, 6)
    ]
    verdict = judge(job, metrics, criteria_set=criteria_set)
    assert (verdict.diagnosis, verdict.outcome) == (diagnosis, Outcome.failure)
    assert verdict.is_mode_collapse


def test_number_of_steps_is_told() -> None:
    job = make_job(epochs=5, dataset_summary={"background_share": 0.93, "num_train": 4_000})
    verdict = judge(job, history(**BLACK))
    assert "The training has 155 steps, and below 1,000 every option fails" in verdict.summary
    assert "not_mode_collapsed" in verdict.summary


def test_short_run_that_passes_is_healthy() -> None:
    job = make_job(dataset_summary={"background_share": 0.93, "num_train": 4_000})
    for criteria_set in CriteriaSet:
        verdict = judge(job, measured_history(), criteria_set=criteria_set)
        assert (verdict.outcome, verdict.diagnosis) == (Outcome.success, Diagnosis.healthy)


def test_short_run_that_diverged_has_diverged() -> None:
    job = make_job(dataset_summary={"background_share": 0.93, "num_train": 4_000})
    assert judge(job, history(train_recon_loss=[1.0, 2.0, 4.0])).diagnosis == Diagnosis.diverged


# -- the order


def test_most_serious_of_several_failures_is_the_diagnosis() -> None:
    """From the latent to what is painted to how the training went."""
    faults: list[dict[str, Any]] = [
        {"val_mutual_information": 0.1},
        {name: series[0] for name, series in BLACK.items()},
        {"val_foreground_ap": 0.1},
        {"val_background_share": 0.8, "val_foreground_precision": 0.2},
        {"val_recon_loss": 2.0},
        {"max_spike_ratio": 9.0},
    ]
    found = []
    for first in range(len(faults)):
        together: dict[str, Any] = {}
        for fault in reversed(faults[first:]):
            together |= fault
        found.append(diagnose_by_evidence(**together).diagnosis)
    assert found == sorted(found, key=list(Diagnosis).index)
    assert found == [
        Diagnosis.posterior_collapse,
        Diagnosis.decision_collapse,
        Diagnosis.under_informed,
        Diagnosis.over_painted,
        Diagnosis.overfitted,
        Diagnosis.unstable,
    ]


def test_measures_of_the_example_meet_every_criterion_of_both_sets() -> None:
    """Else the other tests would prove nothing."""
    metrics = history(is_measured=True, train_recon_loss=HEALTHY_LOSSES)
    for criteria_set in CriteriaSet:
        assert judge(make_job(), metrics, criteria_set=criteria_set).outcome == Outcome.success
    assert all(getattr(metrics[-1], name) == value for name, value in MEASURED.items())
