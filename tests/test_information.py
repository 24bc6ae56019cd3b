"""Mutual information of grid and latent, against closed forms and a plain reference."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from worker.information import Information, Latents, measure_information

CPU = torch.device("cpu")


def draw_mu(*, num_grids: int = 10_000, spreads: list[float], seed: int = 0) -> Tensor:
    """μ ~ N(0, s²) in each dimension, (M, D)."""
    rng = np.random.default_rng(seed)
    mu = rng.standard_normal((num_grids, len(spreads))) * np.array(spreads)
    return torch.from_numpy(mu)


def measure(mu: Tensor, *, sigma: float, seed: int = 42) -> Information:
    logvar = torch.full_like(mu, 2 * math.log(sigma))
    return measure_information(mu, logvar=logvar, seed=seed)


@pytest.mark.parametrize(
    ("spreads", "sigma"),
    [([1.0], 1.0), ([1.0], 0.2), ([3.0, 0.0], 0.5), ([1.0, 0.5, 2.0], 1.0), ([0.7] * 10, 1.0)],
)
def test_information_of_gaussians_is_the_closed_form(spreads: list[float], sigma: float) -> None:
    """Each dimension has 1/2 log(1 + s²/σ²)."""
    truth = [0.5 * math.log(1 + (s / sigma) ** 2) for s in spreads]
    information = measure(draw_mu(spreads=spreads), sigma=sigma)
    assert information.error is not None
    assert information.error < 0.05
    # The M grids are a sample, too, so that a little is added to the standard error.
    tolerance = 4 * information.error + 0.02
    assert information.mutual_information == pytest.approx(sum(truth), abs=tolerance)
    assert information.per_dimension == pytest.approx(truth, abs=0.15)


def test_information_is_that_of_a_plain_sum_over_all_pairs() -> None:
    rng = np.random.default_rng(3)
    mu, logvar = rng.normal(size=(300, 4)), rng.uniform(-20, 2, size=(300, 4))
    information = measure_information(torch.from_numpy(mu), logvar=torch.from_numpy(logvar), seed=7)
    # The same grids and noise, with every log-density by scipy.
    draw = np.random.default_rng([7, 0x1F0])
    grids, sigma = draw.permutation(300), np.exp(logvar / 2)
    z = mu[grids] + sigma[grids] * draw.standard_normal((300, 4))
    pairs = norm.logpdf(z[:, None], mu[None], sigma[None])
    own = norm.logpdf(z, mu[grids], sigma[grids])
    ratios = own.sum(1) - logsumexp(pairs.sum(2), axis=1) + math.log(300)
    by_dimension = (own - logsumexp(pairs, axis=1)).mean(0) + math.log(300)
    assert information.mutual_information == pytest.approx(ratios.mean(), abs=1e-5)
    assert information.error == pytest.approx(ratios.std(ddof=1) / math.sqrt(300), abs=1e-5)
    assert information.per_dimension == pytest.approx(by_dimension, abs=1e-5)


def test_posteriors_that_all_grids_share_have_no_information_whatever_their_kl() -> None:
    """μ = 5 and σ² = e^-20: 22 nats of KL in each of ten dimensions, as a diverged run had."""
    mu = torch.full((5000, 10), 5.0, dtype=torch.float64)
    logvar = torch.full_like(mu, -20.0)
    information = measure_information(mu, logvar=logvar, seed=0)
    assert information.mutual_information == pytest.approx(0.0, abs=1e-6)
    assert information.marginal_kl == pytest.approx(10 * (0.5 * (25 + math.exp(-20) - 1) + 10))
    assert information.per_dimension == pytest.approx([0.0] * 10, abs=1e-6)
    assert information.active_units == 0


def test_information_is_at_most_the_logarithm_of_the_number_of_grids() -> None:
    information = measure(draw_mu(num_grids=500, spreads=[3.0] * 10), sigma=1e-4)
    assert information.mutual_information == pytest.approx(math.log(500), abs=1e-6)


def test_information_and_marginal_kl_add_up_to_the_mean_kl() -> None:
    mu = draw_mu(spreads=[1.0, 2.0])
    information = measure(mu, sigma=0.5)
    kl = 0.5 * (mu.square() + 0.25 - 1 - math.log(0.25)).sum(1).mean().item()
    assert information.mutual_information + information.marginal_kl == pytest.approx(kl)


def test_posteriors_that_add_up_to_the_prior_have_no_marginal_kl() -> None:
    information = measure(draw_mu(spreads=[0.8] * 3), sigma=0.6)
    assert information.error is not None
    assert information.marginal_kl == pytest.approx(0.0, abs=4 * information.error + 0.02)


def test_units_are_active_by_the_variance_of_their_mean() -> None:
    spreads = [0.05, 0.09, 0.11, 1.0]  # 0.1² is the limit
    assert measure(draw_mu(spreads=spreads), sigma=1.0).active_units == 2


def test_a_single_grid_has_no_information_and_no_error() -> None:
    information = measure(draw_mu(num_grids=1, spreads=[1.0]), sigma=0.1)
    assert information.mutual_information == pytest.approx(0.0)
    assert information.error is None


def test_the_sample_follows_from_the_seed_alone() -> None:
    mu = draw_mu(spreads=[1.0, 1.0])
    before = torch.random.get_rng_state()
    first = measure(mu, sigma=0.5, seed=1)
    assert measure(mu, sigma=0.5, seed=1) == first
    assert measure(mu, sigma=0.5, seed=2) != first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_latents_keep_the_first_grids_in_the_order_of_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.information.MAX_GRIDS", 5)
    latents = Latents(num_grids=8, latent_dim=1, device=CPU)
    mu = torch.arange(8.0).unsqueeze(1)
    for _ in range(2):
        latents.reset()
        for batch in mu.split(3):
            latents.add(batch, logvar=-batch)
        assert latents.mu.flatten().tolist() == [0, 1, 2, 3, 4]
        assert latents.logvar.flatten().tolist() == [0, -1, -2, -3, -4]
