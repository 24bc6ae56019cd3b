"""Metrics of validation and test: what goes into them, and likelihoods against scikit-learn."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor

from server.models.epochs import EpochMetrics
from worker.evaluation import (
    EVALUATION_METRICS,
    EvaluationMetrics,
    EvaluationSums,
    compute_log_prior,
)
from worker.losses import GridLoss
from worker.metrics import METRICS
from worker.model import VAEOutput

CPU = torch.device("cpu")
LATENT_DIM = 3


def draw_grids(*, num_grids: int = 60, colours: int = 10, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    grids = rng.integers(1, colours, size=(num_grids, 8, 8), dtype=np.uint8)
    grids[rng.random(grids.shape) > 0.2] = 0
    return torch.from_numpy(grids)


def draw_logits(grids: Tensor, *, seed: int = 1) -> Tensor:
    noise = torch.randn(len(grids), 10, 8, 8, generator=torch.Generator().manual_seed(seed))
    truth = torch.nn.functional.one_hot(grids.long(), 10).permute(0, 3, 1, 2)
    return (truth + noise).contiguous(memory_format=torch.channels_last)


def measure(
    grids: Tensor, logits: Tensor, *, log_prior: Tensor | None = None, num_passes: int = 1
) -> EvaluationMetrics:
    sums = EvaluationSums(
        num_grids=len(grids),
        latent_dim=LATENT_DIM,
        log_prior=torch.zeros(10) if log_prior is None else log_prior,
        seed=42,
        device=CPU,
    )
    latents = torch.randn(len(grids), LATENT_DIM, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros(len(grids))
    loss = GridLoss(zeros, zeros, zeros, torch.zeros_like(latents))
    for _ in range(num_passes):
        sums.reset()
        for part in torch.arange(len(grids)).split(25):
            output = VAEOutput(logits[part], latents[part], torch.zeros_like(latents[part]))
            batch = GridLoss(*(values[part] for values in loss))
            sums.add(batch, output=output, grids=grids[part])
    return sums.compute()


def compute_probabilities(logits: Tensor) -> np.ndarray:
    """Of each cell, (N, 10)."""
    return logits.double().softmax(1).permute(0, 2, 3, 1).reshape(-1, 10).numpy()


def test_log_likelihood_is_scikit_learns_log_loss() -> None:
    grids = draw_grids()
    logits = draw_logits(grids)
    expected = -log_loss(grids.flatten(), compute_probabilities(logits), labels=range(10))
    assert measure(grids, logits).log_likelihood == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_colours", [10, 7])
def test_balanced_log_likelihood_is_log_loss_with_balanced_weights(num_colours: int) -> None:
    """Also where colours do not occur in the split, but in training."""
    grids = draw_grids(colours=num_colours)
    logits = draw_logits(grids)
    counts, weights = torch.tensor([930.0, *[7.0] * 8, 14.0]), torch.linspace(1, 5, 10)
    log_prior = compute_log_prior(counts, class_weights=weights)
    corrected = logits - log_prior.view(1, 10, 1, 1)
    cells = grids.flatten().numpy()
    balanced = 1 / np.bincount(cells, minlength=10)[cells]
    expected = -log_loss(
        cells, compute_probabilities(corrected), labels=range(10), sample_weight=balanced
    )
    measured = measure(grids, logits, log_prior=log_prior).balanced_log_likelihood
    assert measured == pytest.approx(expected, rel=1e-5)


def test_prior_that_training_taught_is_that_of_weighted_colours() -> None:
    counts = torch.tensor([93, 7, 0])
    log_prior = compute_log_prior(counts, class_weights=torch.tensor([0.5, 3.0, 0.0]))
    expected = [math.log(0.5 * 93 / 100), math.log(3 * 7 / 100), math.log(1 / 100)]
    assert log_prior.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 4.0]])
def test_a_classifier_that_knows_the_frequencies_alone_is_balanced_to_chance(
    weights: list[float],
) -> None:
    counts = torch.tensor([93, 7, *[0] * 8])
    log_prior = compute_log_prior(counts, class_weights=torch.tensor([*weights, *[0.0] * 8]))
    grids = draw_grids(colours=2)
    logits = log_prior.view(1, 10, 1, 1).expand(len(grids), 10, 8, 8)
    metrics = measure(grids, logits, log_prior=log_prior)
    assert metrics.balanced_log_likelihood == pytest.approx(-math.log(10), rel=1e-5)


def test_a_second_pass_forgets_the_first() -> None:
    grids = draw_grids()
    logits = draw_logits(grids)
    assert measure(grids, logits, num_passes=2) == measure(grids, logits)


def test_matched_metrics_are_those_of_argmax_where_nothing_has_to_be_shifted() -> None:
    grids = draw_grids()
    exact = 50.0 * torch.nn.functional.one_hot(grids.long(), 10).permute(0, 3, 1, 2)
    metrics = measure(grids, exact)
    assert metrics.matched_recall == metrics.foreground_recall == 1.0
    assert metrics.matched_precision == metrics.foreground_precision == 1.0
    assert metrics.matched_iou == metrics.foreground_iou == 1.0
    assert metrics.matched_accuracy == metrics.pixel_accuracy == 1.0
    assert metrics.colour_ap == metrics.foreground_ap == 1.0


def test_mean_over_colours_leaves_out_those_that_do_not_occur() -> None:
    grids = draw_grids(colours=3)  # colours 1 and 2
    metrics = measure(grids, draw_logits(grids))
    share = (grids > 0).double().mean().item()
    assert metrics.foreground_share == pytest.approx(share)
    assert metrics.colour_prevalence == pytest.approx(share / 2)
    assert metrics.colour_ap is not None
    assert share / 2 < metrics.colour_ap < 1


def test_without_foreground_there_is_no_average_precision_and_nothing_to_match() -> None:
    grids = torch.zeros(4, 8, 8, dtype=torch.uint8)
    metrics = measure(grids, draw_logits(grids))
    names = ("foreground_ap", "colour_ap", "colour_prevalence", "matched_shift", "matched_iou")
    assert [getattr(metrics, name) for name in names] == [None] * len(names)
    assert metrics.log_likelihood is not None
    assert metrics.balanced_log_likelihood == pytest.approx(metrics.log_likelihood, rel=1e-6)


def test_values_that_are_not_finite_are_none() -> None:
    grids = draw_grids()
    logits = draw_logits(grids)
    logits[0, 0, 0, 0] = torch.nan
    metrics = measure(grids, logits)
    numbers = [getattr(metrics, name) for name in EVALUATION_METRICS]
    assert metrics.log_likelihood is None
    assert metrics.foreground_ap is None
    assert metrics.matched_accuracy is None
    assert metrics.mutual_information is not None
    for value in numbers:
        for number in value if isinstance(value, list) else [value]:
            assert number is None or math.isfinite(number)


def test_every_metric_of_an_evaluation_has_a_field_and_a_column() -> None:
    names = {field.name for field in fields(EvaluationMetrics)}
    assert METRICS.keys() | EVALUATION_METRICS.keys() == names
    assert not METRICS.keys() & EVALUATION_METRICS.keys()
    assert {f"val_{name}" for name in names} <= EpochMetrics.model_fields.keys()
