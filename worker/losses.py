"""The terms of the training loss, each a function of its formula, and the class weights.

Reduction: cells and latent dimensions are summed within a grid, as in the ELBO, and the sum is
divided by the number of cells. β = 1 is therefore the ELBO's own weighting at any grid size.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from server.models.configuration import TrainingConfig
from server.models.options import EFFECTIVE_NUMBER_BETA, BetaSchedule, ClassWeighting
from worker.model import VAEOutput

NUM_CYCLES = 4
#: Weights that are closer together than this ratio make no difference to the training.
MIN_WEIGHT_RATIO: Final = 1.01
#: Colours whose numbers of cells are closer together than this could not get other weights.
_UNEVEN_RATIO: Final = 1.1


class GridLoss(NamedTuple):
    """Loss of B grids, per cell: `total`, `recon` and `kl` (B,), `kl_per_dimension`
    (B, latent_dim) in nats, not divided by the cells. `total = recon + beta * kl`."""

    total: Tensor
    recon: Tensor
    kl: Tensor
    kl_per_dimension: Tensor


def compute_loss(
    output: VAEOutput,
    *,
    grids: Tensor,
    class_weights: Tensor,
    focal_gamma: float | Tensor,
    beta: float | Tensor,
    free_bits: float | Tensor,
) -> GridLoss:
    """The β-VAE objective of each grid: (Σ focal + β Σ max(KL_d, free_bits)) / cells."""
    num_cells = grids[0].numel()
    cells = compute_focal_loss(
        output.logits, targets=grids, class_weights=class_weights, gamma=focal_gamma
    )
    recon = cells.flatten(1).sum(1) / num_cells
    kl_per_dimension = compute_kl_per_dimension(output.mu, logvar=output.logvar)
    kl = kl_per_dimension.clamp(min=free_bits).sum(1) / num_cells
    return GridLoss(recon + beta * kl, recon, kl, kl_per_dimension)


def compute_focal_loss(
    logits: Tensor, *, targets: Tensor, class_weights: Tensor, gamma: float | Tensor
) -> Tensor:
    """Weighted focal loss of every cell, w_y (1 - p_y)^γ (-log p_y) (Lin et al., 2017).

    `logits` (B, 10, S, S) and `targets` (B, S, S) give (B, S, S); γ = 0 is cross-entropy.
    """
    targets = targets.long()
    log_p = torch.log_softmax(logits, dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    weighted = class_weights[targets] * -log_p
    if isinstance(gamma, float) and gamma == 0:
        return weighted
    # The floor keeps the gradient of a fractional power finite where p rounds to 1.
    miss = (1.0 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).eps)
    return weighted * miss.pow(gamma)


def compute_kl_per_dimension(mu: Tensor, *, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each dimension in nats (Kingma & Welling, 2014)."""
    return 0.5 * (mu.pow(2) + logvar.exp() - 1.0 - logvar)


def compute_class_weights(
    counts: Tensor,
    *,
    weighting: ClassWeighting,
    effective_number_beta: float = EFFECTIVE_NUMBER_BETA,
) -> Tensor:
    """Weight of each colour from its number of cells in the training split.

    With N cells and K = 10 colours: `inverse` and `balanced` (scikit-learn's name for the
    same) N / (K n_c), `sqrt_inverse` its square root, `effective_number` 1 / (1 - β^n_c)
    scaled to a mean of 1 (Cui et al., 2019), `none` 1. A colour that never occurs gets weight 0,
    since it has no cell.
    """
    counts = counts.to(torch.float64)
    present = counts > 0
    inverse = counts.sum() / (len(counts) * counts.clamp_min(1))
    match weighting:
        case ClassWeighting.none:
            weights = torch.ones_like(counts)
        case ClassWeighting.inverse | ClassWeighting.balanced:
            weights = inverse
        case ClassWeighting.sqrt_inverse:
            weights = inverse.sqrt()
        case ClassWeighting.effective_number:
            weights = 1 / (1 - effective_number_beta ** counts.clamp_min(1))
            weights = weights * present.sum() / weights[present].sum()
    return torch.where(present, weights, 0.0).float()


def find_weight_faults(weights: Tensor, *, counts: Tensor, config: TrainingConfig) -> list[str]:
    """What a user should know of the class weights (10,) and of the counts that they follow from:
    colours that never occur, and a weighting without effect."""
    faults = []
    if absent := torch.nonzero(counts == 0).flatten().tolist():
        faults.append(f"colours {absent} never occur in the training split: weight 0")
    present = weights[counts > 0]
    ratio = (present.max() / present.min()).item()
    if config.class_weighting != ClassWeighting.none and ratio < MIN_WEIGHT_RATIO:
        faults.append(
            f"class_weighting {config.class_weighting} has no effect: the largest weight is "
            f"{ratio:.7f} times the smallest{_suggest_beta(counts, config=config)}"
        )
    return faults


def _suggest_beta(counts: Tensor, *, config: TrainingConfig) -> str:
    """The end of the sentence: a β of `effective_number` that has an effect, if there is one."""
    rarest = int(counts[counts > 0].min())
    is_even = int(counts.max()) < _UNEVEN_RATIO * rarest
    if config.class_weighting != ClassWeighting.effective_number or is_even:
        return ""
    return (
        f". An effective_number_beta nearer 1 than {config.effective_number_beta:g} has one, as "
        f"{1 - 1 / rarest:.10g}: that is 1 - 1/{rarest}, and the rarest colour has so many cells"
    )


def compute_beta(config: TrainingConfig, *, step: int, num_steps: int) -> float:
    """β at `step` (from 0) of the job's `num_steps`.

    `linear_warmup` rises from 0 over the first `beta_warmup_fraction` of the steps and stays;
    `cyclical` (Fu et al., 2019) rises over the first half of each of four cycles and stays for
    the second half; `constant` is β throughout.
    """
    match config.beta_schedule:
        case BetaSchedule.constant:
            return config.beta
        case BetaSchedule.linear_warmup:
            ramp = config.beta_warmup_fraction * num_steps
            return config.beta * min(1.0, step / ramp) if ramp else config.beta
        case BetaSchedule.cyclical:
            position = step * NUM_CYCLES / num_steps % 1.0
            return config.beta * min(1.0, 2 * position)
