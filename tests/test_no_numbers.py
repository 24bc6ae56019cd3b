"""What is NaN or infinite meets no criterion, and rounding decides nothing."""

import math
from collections.abc import Iterator

import pytest
from artificial_runs import (
    BLACK,
    history,
    make_epoch,
    make_job,
    make_measured_epoch,
    measured_history,
)
from hypothesis import given
from hypothesis import strategies as st

from server.judging.criteria import (
    CriteriaSet,
    CriterionName,
    CriterionStatus,
    is_above,
    is_at_least,
    is_at_most,
    is_below,
)
from server.judging.verdicts import judge
from server.models.epochs import EpochMetrics

NO_NUMBERS = (math.nan, math.inf, -math.inf)
PASSED = CriterionStatus.passed


#: Runs of which each criterion passes, fails or has no data.
RUNS = {
    "good": measured_history(),
    "old": [make_epoch(epoch) for epoch in (1, 2, 3)],
    "short": [make_measured_epoch()],
    "bad": history(
        is_measured=True,
        **BLACK,
        train_pixel_accuracy=[0.9, 0.7, 0.95],
        train_recon_loss=[1.0, 1.2, 1.4],
        val_recon_loss=[1.0, 1.2, 2.0],
        val_kl_per_dimension=[[0.0, 0.01]] * 3,
        val_foreground_ap=[0.08] * 3,
        val_colour_ap=[0.008] * 3,
        val_mutual_information=[0.1] * 3,
        val_active_units_variance=[0] * 3,
        val_foreground_precision=[0.01] * 3,
        max_spike_ratio=[9.0] * 3,
    ),
    "no foreground": measured_history(
        val_foreground_recall=None, val_foreground_ap=None, val_colour_ap=None,
        val_colour_prevalence=None, val_foreground_precision=None, val_foreground_share=0.0,
    ),
}  # fmt: skip
COLUMNS = [
    name
    for name in EpochMetrics.model_fields
    if name.startswith(("train_", "val_", "max_", "beta"))
]


def list_statuses(metrics: list[EpochMetrics]) -> dict[CriterionName, CriterionStatus]:
    verdicts = [judge(make_job(), metrics, criteria_set=each) for each in CriteriaSet]
    return {each.name: each.status for verdict in verdicts for each in verdict.criteria}


def replace_value(
    metrics: list[EpochMetrics], row: int, name: str, value: float
) -> list[EpochMetrics]:
    """The history with this value in the column, and in each place of a list."""
    before = getattr(metrics[row], name)
    changed = [value, *before[1:]] if isinstance(before, list) else value
    copy = metrics[row].model_copy(update={name: changed})
    return [*metrics[:row], copy, *metrics[row + 1 :]]


def list_changes(metrics: list[EpochMetrics]) -> Iterator[tuple[int, str, float]]:
    for row in range(len(metrics)):
        for name in COLUMNS:
            for value in NO_NUMBERS:
                yield row, name, value


@pytest.mark.parametrize("run", RUNS)
def test_value_that_is_no_number_never_turns_a_failure_or_a_lack_of_data_into_a_pass(
    run: str,
) -> None:
    metrics = RUNS[run]
    before = list_statuses(metrics)
    wrong = [
        (change, name)
        for change in list_changes(metrics)
        for name, status in list_statuses(replace_value(metrics, *change)).items()
        if status is PASSED and before[name] is not PASSED
    ]
    assert wrong == []


@given(data=st.data())
def test_several_values_that_are_no_numbers_never_turn_a_failure_into_a_pass(
    data: st.DataObject,
) -> None:
    metrics = RUNS[data.draw(st.sampled_from(sorted(RUNS)))]
    before = list_statuses(metrics)
    changes = st.lists(st.sampled_from(list(list_changes(metrics))), min_size=2, max_size=8)
    for change in data.draw(changes):
        metrics = replace_value(metrics, *change)
    passed = {name for name, status in list_statuses(metrics).items() if status is PASSED}
    assert passed <= {name for name, status in before.items() if status is PASSED}


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize(
    ("name", "columns"),
    {
        "accuracy_in_range": ["train_pixel_accuracy"],
        "not_mode_collapsed": ["val_foreground_recall", "val_all_black_share"],
        "kl_per_dimension": ["val_kl_per_dimension"],
        "informative": ["val_mutual_information", "val_active_units_variance"],
        "separates_foreground": ["val_foreground_ap", "val_foreground_share"],
        "knows_colours": ["val_colour_ap", "val_colour_prevalence"],
        "paints_truthfully": ["val_background_share", "val_foreground_share",
                              "val_foreground_precision", "val_foreground_recall"],
        "generalises": ["val_recon_loss", "train_recon_loss"],
        "loss_decreases": ["train_recon_loss", "train_kl_loss", "beta"],
        "stable": ["train_pixel_accuracy", "train_recon_loss", "train_kl_loss", "max_spike_ratio"],
    }.items(),
)  # fmt: skip
def test_criterion_does_not_pass_by_a_value_that_is_no_number(
    name: CriterionName, columns: list[str], value: float
) -> None:
    metrics = measured_history()
    assert list_statuses(metrics)[name] is PASSED
    for column in columns:
        assert list_statuses(replace_value(metrics, 2, column, value))[name] is not PASSED, column


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("limit", [0.0, 1.0, *NO_NUMBERS])
def test_nothing_holds_of_a_value_that_is_no_number(value: float, limit: float) -> None:
    for compare in (is_above, is_at_least, is_at_most, is_below):
        assert not compare(value, limit)
        assert not compare(limit, value)


@pytest.mark.parametrize(
    ("value", "limit"), [(0.1 + 0.2, 0.3), (0.3, 0.1 + 0.2), (1e-17, 0.0), (0.0, 1e-17), (1.0, 1.0)]
)
def test_value_that_differs_from_its_threshold_by_rounding_is_equal_to_it(
    value: float, limit: float
) -> None:
    assert is_at_most(value, limit) and is_at_least(value, limit)
    assert not is_above(value, limit) and not is_below(value, limit)


def test_values_near_a_threshold_are_still_told_apart() -> None:
    assert is_above(1.00001, 1.0) and not is_at_most(1.00001, 1.0)
    assert is_below(0.99999, 1.0) and not is_at_least(0.99999, 1.0)
