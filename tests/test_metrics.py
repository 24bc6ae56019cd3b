"""Metrics from counts."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from server.models.epochs import EpochMetrics
from worker.losses import GridLoss
from worker.metrics import (
    METRICS,
    Counts,
    MetricSums,
    SplitMetrics,
    compute_spike_ratios,
    count_batch,
    count_by_product,
)


def measure(grids: list[list[int]], predicted: list[list[int]]) -> SplitMetrics:
    """Metrics of 2x2 grids given as rows of four cells, in two batches."""
    sums = MetricSums(latent_dim=2, device=torch.device("cpu"))
    for grid, guess in zip(grids, predicted, strict=True):
        target = torch.tensor(grid, dtype=torch.uint8).view(1, 2, 2)
        logits = torch.nn.functional.one_hot(torch.tensor(guess), 10).T.view(1, 10, 2, 2).float()
        loss = GridLoss(
            torch.tensor([1.0]),
            torch.tensor([0.5]),
            torch.tensor([0.25]),
            torch.tensor([[0.06, 0.04]]),
        )
        sums.add(count_batch(loss, logits=logits, grids=target))
    return sums.compute()


def test_counts_are_summed_over_batches_and_divided_once() -> None:
    metrics = measure([[0, 0, 1, 2], [0, 0, 0, 3]], [[0, 4, 1, 5], [0, 0, 0, 0]])
    assert metrics.pixel_accuracy == 5 / 8
    assert metrics.foreground_recall == 1 / 3
    assert metrics.foreground_iou == 1 / 4
    assert metrics.recall_per_colour == [4 / 5, 1.0, 0.0, 0.0, None, None, None, None, None, None]
    assert metrics.balanced_accuracy == (4 / 5 + 1) / 4
    assert metrics.background_share == 5 / 8
    assert metrics.all_black_share == 1 / 2
    assert metrics.exact_grid_rate == 0
    assert metrics.loss == 1.0
    assert metrics.kl_per_dimension == pytest.approx([0.06, 0.04])
    assert metrics.active_units == 1


def test_cells_counted_as_on_a_gpu_are_those_counted_one_by_one() -> None:
    generator = np.random.default_rng(0)
    true, predicted = generator.choice(10, p=[0.91] + [0.01] * 9, size=(2, 100_000))
    counted = count_by_product(torch.tensor(true), predicted=torch.tensor(predicted))
    expected = confusion_matrix(true, predicted, labels=range(10))
    assert np.array_equal(counted.view(10, 10).numpy(), expected)


def test_a_foreground_cell_in_a_wrong_colour_is_not_recalled() -> None:
    metrics = measure([[1, 1, 0, 0]], [[2, 1, 0, 0]])
    assert metrics.foreground_recall == 1 / 2


def test_precision_counts_a_wrong_colour_as_wrong_and_the_mask_does_not() -> None:
    # Foreground 1, 1, 2; painted 2 (wrong colour), 1 (right), nothing, and 3 on background.
    metrics = measure([[1, 1, 2, 0]], [[2, 1, 0, 3]])
    assert metrics.foreground_share == 3 / 4
    assert metrics.foreground_precision == 1 / 3
    assert metrics.foreground_iou == 1 / 4
    assert metrics.foreground_iou_any_colour == 2 / 4
    # Colour 1: one of two; colour 2: painted in a wrong place; colour 3: does not exist.
    assert metrics.colour_iou == pytest.approx((1 / 2 + 0 + 0) / 3)


def test_intersections_over_union_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    grids, guesses = rng.integers(0, 4, (2, 30, 4))
    metrics = measure(grids.tolist(), guesses.tolist())
    truth, guess = grids.ravel(), guesses.ravel()
    assert metrics.foreground_iou_any_colour == pytest.approx(jaccard_score(truth > 0, guess > 0))
    macro = jaccard_score(truth, guess, labels=[1, 2, 3], average="macro")
    assert metrics.colour_iou == pytest.approx(macro)


def test_nothing_painted_has_no_precision_and_no_overlap() -> None:
    metrics = measure([[1, 0, 0, 0]], [[0, 0, 0, 0]])
    assert metrics.foreground_precision is None
    assert metrics.foreground_iou_any_colour == 0.0
    assert metrics.colour_iou == 0.0


def test_exact_grids_are_counted() -> None:
    assert (
        measure([[1, 2, 3, 0], [1, 0, 0, 0]], [[1, 2, 3, 0], [0, 0, 0, 0]]).exact_grid_rate == 0.5
    )


def test_without_foreground_there_is_no_recall_rather_than_zero() -> None:
    metrics = measure([[0, 0, 0, 0]], [[0, 0, 0, 0]])
    assert metrics.foreground_recall is None
    assert metrics.foreground_iou is None
    assert metrics.foreground_iou_any_colour is None
    assert metrics.colour_iou is None
    assert metrics.foreground_share == 0.0
    assert metrics.recall_per_colour[1:] == [None] * 9
    assert metrics.balanced_accuracy == 1.0


def test_recall_of_an_absent_colour_is_none() -> None:
    confusion = np.zeros((10, 10), dtype=int)
    confusion[0, 0], confusion[1, 0] = 4, 2
    counts = Counts(confusion, 1, 0, 0, losses=[0.0] * 3, kl_per_dimension=[0.0])
    assert METRICS["recall_per_colour"](counts) == [1.0, 0.0] + [None] * 8


def test_every_metric_has_a_field_and_a_column_for_each_split() -> None:
    names = {field.name for field in fields(SplitMetrics)}
    assert METRICS.keys() == names
    columns = EpochMetrics.model_fields.keys()
    assert {f"{split}_{name}" for split in ("train", "val") for name in names} <= columns


def test_spike_ratios_compare_each_step_with_the_median_before_it() -> None:
    losses = np.ones(60)
    losses[30] = 4.0
    ratios = compute_spike_ratios(losses)
    assert len(ratios) == 55
    assert ratios.max() == ratios[25] == 4.0


@pytest.mark.parametrize("num_steps", [6, 49, 50, 51, 52, 300])
def test_spike_ratios_are_those_of_a_plain_loop(num_steps: int) -> None:
    losses = np.random.default_rng(0).random(num_steps, dtype=np.float32) + 0.1
    plain = [losses[i] / np.median(losses[max(0, i - 50) : i]) for i in range(5, num_steps)]
    assert compute_spike_ratios(losses).tolist() == np.array(plain).tolist()


@pytest.mark.parametrize(
    ("losses", "highest"),
    [
        (np.zeros(60), 0.0),
        (np.array([0.0] * 30 + [5e-4] + [0.0] * 30), 0.5),
        (np.array([0.0] * 30 + [0.1] + [0.0] * 30), 100.0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spike_ratio_of_losses_of_almost_nothing_is_finite(
    losses: np.ndarray, highest: float, dtype: type[np.floating[Any]]
) -> None:
    ratios = compute_spike_ratios(losses.astype(dtype))
    assert ratios.dtype == dtype
    assert ratios.max() == pytest.approx(highest)


def test_an_epoch_of_few_steps_has_no_spike_ratios() -> None:
    assert compute_spike_ratios(np.ones(5)).size == 0
