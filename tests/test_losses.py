"""Each formula against its source."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy

from server.models.configuration import TrainingConfig
from server.models.options import BetaSchedule, ClassWeighting
from worker.atomic import generate_atomic
from worker.losses import (
    compute_beta,
    compute_class_weights,
    compute_focal_loss,
    compute_kl_per_dimension,
    compute_loss,
    find_weight_faults,
)
from worker.model import VAEOutput

ONES = torch.ones(10)
COUNTS = torch.tensor([930, 10, 20, 5, 5, 5, 5, 10, 5, 5])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 10, 4, 4), torch.randint(10, (3, 4, 4), dtype=torch.uint8)


def test_focal_loss_without_gamma_is_cross_entropy(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, targets = batch
    weights = torch.rand(10)
    loss = compute_focal_loss(logits, targets=targets, class_weights=weights, gamma=0.0)
    expected = cross_entropy(logits, targets.long(), weight=weights, reduction="none")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_is_its_closed_form(
    batch: tuple[torch.Tensor, torch.Tensor], gamma: float
) -> None:
    logits, targets = batch
    loss = compute_focal_loss(logits, targets=targets, class_weights=ONES, gamma=gamma)
    p = logits.softmax(1).gather(1, targets.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(loss, (1 - p) ** gamma * -p.log())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_has_a_finite_gradient_where_p_rounds_to_one(gamma: float) -> None:
    logits = torch.zeros(1, 10, 1, 1)
    logits[0, 3] = 200.0
    logits.requires_grad_()
    target = torch.full((1, 1, 1), 3)
    loss = compute_focal_loss(logits, targets=target, class_weights=ONES, gamma=gamma)
    loss.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_kl_is_that_of_torch_distributions() -> None:
    mu, logvar = torch.randn(5, 7), torch.randn(5, 7)
    prior = Normal(torch.zeros(5, 7), torch.ones(5, 7))
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), prior)
    torch.testing.assert_close(compute_kl_per_dimension(mu, logvar=logvar), expected)


def test_loss_sums_cells_and_dimensions_then_divides_by_the_cells() -> None:
    """Pins the reduction: a mean over cells beside a sum over dimensions would make β worth
    256 times as much."""
    logits = torch.zeros(2, 10, 16, 16)
    mu = torch.full((2, 3), 2.0)
    grids = torch.zeros(2, 16, 16, dtype=torch.uint8)
    loss = compute_loss(
        VAEOutput(logits, mu, torch.zeros(2, 3)),
        grids=grids,
        class_weights=ONES,
        focal_gamma=0.0,
        beta=1.5,
        free_bits=0.0,
    )
    recon_sum, kl_sum = 256 * np.log(10), 3 * 2.0
    torch.testing.assert_close(loss.recon, torch.full((2,), recon_sum / 256))
    torch.testing.assert_close(loss.kl, torch.full((2,), kl_sum / 256))
    torch.testing.assert_close(loss.total, torch.full((2,), (recon_sum + 1.5 * kl_sum) / 256))


def test_free_bits_are_a_floor_for_each_dimension() -> None:
    mu = torch.tensor([[0.0, 2.0]])
    loss = compute_loss(
        VAEOutput(torch.zeros(1, 10, 4, 4), mu, torch.zeros(1, 2)),
        grids=torch.zeros(1, 4, 4, dtype=torch.uint8),
        class_weights=ONES,
        focal_gamma=0.0,
        beta=1.0,
        free_bits=0.5,
    )
    assert loss.kl.item() == pytest.approx((0.5 + 2.0) / 16)
    assert loss.kl_per_dimension.tolist() == [[0.0, 2.0]]


def test_inverse_weights_are_the_closed_form_and_scikit_learns_balanced() -> None:
    labels = np.repeat(np.arange(10), COUNTS.numpy())
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    for weighting in (ClassWeighting.inverse, ClassWeighting.balanced):
        weights = compute_class_weights(COUNTS, weighting=weighting)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
        np.testing.assert_allclose(weights, 1000 / (10 * COUNTS.numpy()), rtol=1e-6)


def test_sqrt_inverse_weights_are_the_root_of_the_inverse_ones() -> None:
    inverse = compute_class_weights(COUNTS, weighting=ClassWeighting.inverse)
    root = compute_class_weights(COUNTS, weighting=ClassWeighting.sqrt_inverse)
    torch.testing.assert_close(root, inverse.sqrt())


def test_effective_number_weights_are_those_of_the_paper() -> None:
    weights = compute_class_weights(COUNTS, weighting=ClassWeighting.effective_number)
    raw = 0.0001 / (1 - 0.9999 ** COUNTS.double())
    torch.testing.assert_close(weights, (raw * 10 / raw.sum()).float())
    of_another = compute_class_weights(
        COUNTS, weighting=ClassWeighting.effective_number, effective_number_beta=0.9
    )
    raw = 0.1 / (1 - 0.9 ** COUNTS.double())
    torch.testing.assert_close(of_another, (raw * 10 / raw.sum()).float())

    of_another = compute_class_weights(
        COUNTS, weighting=ClassWeighting.effective_number, effective_number_beta=0.9
    )
    raw = 0.1 / (1 - 0.9 ** COUNTS.double())
    torch.testing.assert_close(of_another, (raw * 10 / raw.sum()).float())


def test_none_weighs_every_colour_alike() -> None:
    assert compute_class_weights(COUNTS, weighting=ClassWeighting.none).tolist() == [1.0] * 10


@pytest.mark.parametrize("weighting", list(ClassWeighting))
def test_a_colour_that_never_occurs_weighs_nothing_and_is_warned_of(
    weighting: ClassWeighting,
) -> None:
    counts = COUNTS.clone()
    counts[7] = 0
    config = TrainingConfig(class_weighting=weighting)
    weights = compute_class_weights(counts, weighting=weighting)
    assert weights[7] == 0
    assert torch.isfinite(weights).all()
    assert (weights[:7] > 0).all()
    faults = find_weight_faults(weights, counts=counts, config=config)
    assert "colours [7] never occur in the training split: weight 0" in faults


def find_faults(counts: torch.Tensor, **settings: object) -> list[str]:
    config = TrainingConfig.model_validate(settings)
    weights = compute_class_weights(
        counts,
        weighting=config.class_weighting,
        effective_number_beta=config.effective_number_beta,
    )
    return find_weight_faults(weights, counts=counts, config=config)


def test_effective_number_without_effect_names_a_beta_that_has_one() -> None:
    counts = torch.tensor([19_075_072, 155_000, *[156_000] * 8])
    (fault,) = find_faults(counts, class_weighting="effective_number")
    assert "effective_number has no effect: the largest weight is 1.0000002 times" in fault
    suggested = float(fault.split(" has one, as ")[1].split(":")[0])
    assert suggested == pytest.approx(1 - 1 / 155_000, abs=1e-9)
    setting = {"class_weighting": "effective_number", "effective_number_beta": suggested}
    assert find_faults(counts, **setting) == []


@pytest.mark.parametrize("weighting", ["inverse", "sqrt_inverse", "balanced"])
def test_weighting_with_an_effect_is_not_warned_of(weighting: str) -> None:
    assert find_faults(COUNTS, class_weighting=weighting) == []
    assert find_faults(torch.full((10,), 50), class_weighting="none") == []


@pytest.mark.parametrize("weighting", ["inverse", "sqrt_inverse", "effective_number"])
def test_weighting_of_equally_frequent_colours_is_warned_of_without_a_remedy(
    weighting: str,
) -> None:
    (fault,) = find_faults(torch.full((10,), 10**6), class_weighting=weighting)
    assert fault.endswith("has no effect: the largest weight is 1.0000000 times the smallest")


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9999, 1 - 1e-9, 1 - 2**-53])
def test_every_allowed_beta_of_effective_number_gives_finite_weights(beta: float) -> None:
    weights = compute_class_weights(
        torch.tensor([10**9, 1, *[10**6] * 8]),
        weighting=ClassWeighting.effective_number,
        effective_number_beta=TrainingConfig(effective_number_beta=beta).effective_number_beta,
    )
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


def test_on_the_real_corpus_the_root_turns_123_to_1_into_11_to_1() -> None:
    grids = generate_atomic(num_grids=100_000, seed=42)
    counts = torch.from_numpy(np.bincount(grids.reshape(-1), minlength=10))
    inverse = compute_class_weights(counts, weighting=ClassWeighting.inverse)
    root = compute_class_weights(counts, weighting=ClassWeighting.sqrt_inverse)
    assert 119 <= inverse.max() / inverse.min() <= 128
    assert 10.8 <= root.max() / root.min() <= 11.4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (BetaSchedule.constant, [2.0, 2.0, 2.0, 2.0, 2.0]),
        (BetaSchedule.linear_warmup, [0.0, 1.0, 2.0, 2.0, 2.0]),
        (BetaSchedule.cyclical, [0.0, 1.6, 0.0, 0.0, 1.92]),
    ],
)
def test_beta_follows_its_schedule(schedule: BetaSchedule, expected: list[float]) -> None:
    config = TrainingConfig(beta=2.0, beta_schedule=schedule, beta_warmup_fraction=0.2)
    betas = [compute_beta(config, step=step, num_steps=100) for step in (0, 10, 50, 75, 87)]
    assert betas == pytest.approx(expected)
