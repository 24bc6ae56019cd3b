"""Information: how much the latent says about the grid, in nats.

The KL is no measure of it: a posterior that is far from the prior, but the same for every grid,
has a large KL and says nothing. KL = mutual information + marginal KL (Hoffman & Johnson, 2016).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from worker.losses import compute_kl_per_dimension

#: Grids whose posteriors make up the aggregated posterior; the first of a split, which is shuffled.
MAX_GRIDS: Final = 10_000
MAX_SAMPLES: Final = 2_000
#: The same for each dimension alone, where fewer posteriors fill the line.
MAX_GRIDS_PER_DIMENSION: Final = 2_000
MAX_SAMPLES_PER_DIMENSION: Final = 500
#: Burda et al., 2016.
ACTIVE_UNIT_VARIANCE: Final = 0.01
_SAMPLES_PER_CHUNK: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Information:
    """What the latents of a split say; nats, but for `active_units`.

    `error` is the standard error of `mutual_information` over the sample. `marginal_kl` is the KL
    from the aggregated posterior to the prior: the mean KL less `mutual_information`, and as that
    is an estimate, it may be a little below 0.
    """

    mutual_information: float
    error: float | None
    marginal_kl: float
    per_dimension: list[float]
    active_units: int


class Latents:
    """The posteriors of a split's first grids, on the device at fixed addresses.

    `mu` and `logvar` are (M, latent_dim) with M at most MAX_GRIDS.
    """

    def __init__(self, *, num_grids: int, latent_dim: int, device: torch.device) -> None:
        shape = min(num_grids, MAX_GRIDS), latent_dim
        self.mu = torch.zeros(shape, device=device)
        self.logvar = torch.zeros(shape, device=device)
        self._num_added = 0

    def reset(self) -> None:
        self._num_added = 0

    def add(self, mu: Tensor, *, logvar: Tensor) -> None:
        """Take the next grids' (B, latent_dim); those for which there is no room are left out."""
        first = self._num_added
        self._num_added = min(first + len(mu), len(self.mu))
        num_taken = self._num_added - first
        self.mu[first : self._num_added] = mu[:num_taken]
        self.logvar[first : self._num_added] = logvar[:num_taken]

    def measure(self, *, seed: int) -> Information:
        return measure_information(self.mu.double(), logvar=self.logvar.double(), seed=seed)


def measure_information(mu: Tensor, *, logvar: Tensor, seed: int) -> Information:
    """Of posteriors N(mu, exp(logvar)), both (M, latent_dim) and float64.

    The sample depends on nothing but `seed` and the shape, so that a resumed run has the same, and
    no difference between epochs comes from it.
    """
    ratios = _compute_log_ratios(mu, logvar=logvar, seed=seed)
    mutual_information = ratios.mean()
    mean_kl = compute_kl_per_dimension(mu, logvar=logvar).sum(1).mean()
    num_samples = len(ratios)
    return Information(
        mutual_information=mutual_information.item(),
        error=ratios.std().item() / math.sqrt(num_samples) if num_samples > 1 else None,
        marginal_kl=(mean_kl - mutual_information).item(),
        per_dimension=_measure_dimensions(mu, logvar=logvar, seed=seed),
        active_units=int((mu.var(0, correction=0) > ACTIVE_UNIT_VARIANCE).sum()),
    )


def _compute_log_ratios(mu: Tensor, *, logvar: Tensor, seed: int) -> Tensor:
    """log q(z|x) - log (1/M Σ_m q(z|x_m)) for grids x of a sample and z ~ q(z|x), (S,).

    The mean is the mutual information of the latent and a grid drawn from the M; none is above
    log M. The square (z - mu)² / var is expanded, so that all pairs are one matrix product: in
    float64 and around the mean, since a variance may be e^-20 (then exact to 1e-5). The
    densities' common factor is left out.
    """
    mu = mu - mu.mean(0)
    grids, noise = _draw_sample(mu.shape, num_samples=MAX_SAMPLES, seed=seed, device=mu.device)
    z = mu[grids] + torch.exp(0.5 * logvar[grids]) * noise
    own = -0.5 * (noise.square() + logvar[grids]).sum(1)
    precisions = torch.exp(-logvar)
    factors = torch.cat([-0.5 * precisions, mu * precisions], dim=1).t()
    constants = -0.5 * (mu.square() * precisions + logvar).sum(1)
    mixture = [
        torch.logsumexp(torch.cat([part.square(), part], dim=1) @ factors + constants, dim=1)
        for part in torch.split(z, _SAMPLES_PER_CHUNK)
    ]
    return own - torch.cat(mixture) + math.log(len(mu))


def _measure_dimensions(mu: Tensor, *, logvar: Tensor, seed: int) -> list[float]:
    """As the mean of `_compute_log_ratios`, of each dimension alone and without expansion."""
    mu, logvar = mu[:MAX_GRIDS_PER_DIMENSION], logvar[:MAX_GRIDS_PER_DIMENSION]
    grids, noise = _draw_sample(
        mu.shape, num_samples=MAX_SAMPLES_PER_DIMENSION, seed=seed, device=mu.device
    )
    z = mu[grids] + torch.exp(0.5 * logvar[grids]) * noise
    own = -0.5 * (noise.square() + logvar[grids])
    mixture = [
        torch.logsumexp(-0.5 * ((z_d.unsqueeze(1) - mu_d).square() * torch.exp(-lv_d) + lv_d), 1)
        for z_d, mu_d, lv_d in zip(z.unbind(1), mu.unbind(1), logvar.unbind(1), strict=True)
    ]
    means = (own - torch.stack(mixture, dim=1)).mean(0) + math.log(len(mu))
    return [float(mean) for mean in means.tolist()]


def _draw_sample(
    shape: torch.Size, *, num_samples: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Up to `num_samples` different grids (S,), and standard normal noise (S, latent_dim) for
    them: from a generator of its own, so that no random number of the training changes."""
    num_grids, latent_dim = shape
    rng = np.random.default_rng([seed, 0x1F0])
    grids = rng.permutation(num_grids)[:num_samples]
    noise = rng.standard_normal((len(grids), latent_dim))
    return torch.from_numpy(grids).to(device), torch.from_numpy(noise).to(device)
