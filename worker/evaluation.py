"""Metrics of validation and test: what a model knows, beside what argmax makes of it.

A new one is one function registered with `@evaluation_metric`, its field in `EvaluationMetrics`,
and its column in `server.models.epochs.EpochMetrics` with a migration.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.models.configuration import NUM_COLOURS
from worker.information import Information, Latents
from worker.losses import GridLoss
from worker.metrics import METRICS, Counts, MetricSums, SplitMetrics, count_batch
from worker.model import VAEOutput
from worker.scores import Match, Scores, ScoreSums


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMetrics(SplitMetrics):
    """Metrics of one pass over validation or test; a value that is not finite is None."""

    log_likelihood: float | None
    balanced_log_likelihood: float | None
    foreground_ap: float | None
    colour_ap: float | None
    colour_prevalence: float | None
    matched_shift: float | None
    matched_recall: float | None
    matched_precision: float | None
    matched_iou: float | None
    matched_accuracy: float | None
    mutual_information: float | None
    mutual_information_error: float | None
    marginal_kl: float | None
    active_units_variance: int
    information_per_dimension: list[float] | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured over the grids of a split, on the host.

    `log_likelihoods` and `balanced_log_likelihoods` (10,) are sums over the cells of each true
    colour, in nats.
    """

    counts: Counts
    log_likelihoods: npt.NDArray[np.float64]
    balanced_log_likelihoods: npt.NDArray[np.float64]
    scores: Scores
    information: Information


Compute = TypeVar("Compute", bound=Callable[[Evaluation], Any])

#: Every metric of validation and test that training has not, by the name of its field.
EVALUATION_METRICS: Final[dict[str, Callable[[Evaluation], Any]]] = {}


def evaluation_metric(compute: Compute) -> Compute:
    """Register a function as the metric of its name."""
    EVALUATION_METRICS[compute.__name__] = compute
    return compute


@evaluation_metric
def log_likelihood(evaluation: Evaluation) -> float:
    """Mean log p_y over the cells, in nats and without class weights."""
    return float(evaluation.log_likelihoods.sum()) / evaluation.counts.num_cells


@evaluation_metric
def balanced_log_likelihood(evaluation: Evaluation) -> float:
    """Mean over the colours that occur of the mean log p_y over their cells, after the prior that
    training taught was taken from p; see `compute_log_prior`."""
    num_cells = evaluation.counts.confusion.sum(1)
    occurs = num_cells > 0
    return float((evaluation.balanced_log_likelihoods[occurs] / num_cells[occurs]).mean())


@evaluation_metric
def foreground_ap(evaluation: Evaluation) -> float:
    """Average precision of 1 - p_0 for the foreground."""
    return evaluation.scores.average_precisions[0]


@evaluation_metric
def colour_ap(evaluation: Evaluation) -> float | None:
    """Mean over the foreground colours that occur of the average precision of p_c, one colour
    against the rest."""
    return _mean_over_colours(evaluation, evaluation.scores.average_precisions)


@evaluation_metric
def colour_prevalence(evaluation: Evaluation) -> float | None:
    """Mean share of the cells that those colours have: the `colour_ap` of random scores."""
    return _mean_over_colours(evaluation, evaluation.scores.prevalences)


@evaluation_metric
def matched_shift(evaluation: Evaluation) -> float | None:
    """What is subtracted from the background's logit, so that the painted share comes as near as
    possible to the true one: positive if argmax paints too little."""
    return _read_match(evaluation, lambda match: match.shift)


@evaluation_metric
def matched_recall(evaluation: Evaluation) -> float | None:
    """The foreground recall after the shift."""
    return _read_match(evaluation, lambda match: match.recall)


@evaluation_metric
def matched_precision(evaluation: Evaluation) -> float | None:
    """The foreground precision after the shift."""
    return _read_match(evaluation, lambda match: match.precision)


@evaluation_metric
def matched_iou(evaluation: Evaluation) -> float | None:
    """The foreground IoU after the shift."""
    return _read_match(evaluation, lambda match: match.iou)


@evaluation_metric
def matched_accuracy(evaluation: Evaluation) -> float | None:
    """The pixel accuracy after the shift."""
    return _read_match(evaluation, lambda match: match.accuracy)


@evaluation_metric
def mutual_information(evaluation: Evaluation) -> float:
    """Of grid and latent, in nats (Hoffman & Johnson, 2016)."""
    return evaluation.information.mutual_information


@evaluation_metric
def mutual_information_error(evaluation: Evaluation) -> float | None:
    """Its standard error over the sample."""
    return evaluation.information.error


@evaluation_metric
def marginal_kl(evaluation: Evaluation) -> float:
    """KL from the aggregated posterior to the prior, in nats: the rest of the mean KL."""
    return evaluation.information.marginal_kl


@evaluation_metric
def active_units_variance(evaluation: Evaluation) -> int:
    """Latent dimensions whose μ has a variance above 0.01 (Burda et al., 2016)."""
    return evaluation.information.active_units


@evaluation_metric
def information_per_dimension(evaluation: Evaluation) -> list[float]:
    """Mutual information of the grid and each latent dimension alone, in nats."""
    return evaluation.information.per_dimension


class EvaluationSums:
    """Sums, histograms and latents of a split in eval mode, kept on the device and read once.

    All its tensors keep their addresses, and `add` waits for nothing, so that a pass over a split
    can be captured as a graph.
    """

    def __init__(
        self,
        *,
        num_grids: int,
        latent_dim: int,
        log_prior: Tensor,
        seed: int,
        device: torch.device,
    ) -> None:
        """`log_prior` (10,) is that of `compute_log_prior`; `seed` is the job's."""
        self._counts = MetricSums(latent_dim=latent_dim, device=device)
        self._scores = ScoreSums(device=device)
        self._latents = Latents(num_grids=num_grids, latent_dim=latent_dim, device=device)
        # Rows: plain and balanced.
        self._log_likelihoods = torch.zeros(2, NUM_COLOURS, dtype=torch.float64, device=device)
        self._log_prior = log_prior.to(device).unsqueeze(1)
        self._one_hot = torch.eye(NUM_COLOURS, device=device)
        self._seed = seed

    def reset(self) -> None:
        self._counts.reset()
        self._scores.reset()
        self._latents.reset()
        self._log_likelihoods.zero_()

    @torch.no_grad()
    def add(self, batch: GridLoss, *, output: VAEOutput, grids: Tensor) -> None:
        """Measure a batch of `grids` (B, S, S)."""
        self._counts.add(count_batch(batch, logits=output.logits, grids=grids))
        logits = output.logits.transpose(0, 1).flatten(1).contiguous()
        targets = grids.long().view(1, -1)
        self._scores.add(logits, targets=targets)
        self._latents.add(output.mu, logvar=output.logvar)
        self._add_log_likelihoods(logits, targets=targets)

    def compute(self) -> EvaluationMetrics:
        """Every metric; the only place where the values leave the device."""
        log_likelihoods, balanced = self._log_likelihoods.cpu().numpy()
        evaluation = Evaluation(
            counts=self._counts.read(),
            log_likelihoods=log_likelihoods,
            balanced_log_likelihoods=balanced,
            scores=self._scores.measure(),
            information=self._latents.measure(seed=self._seed),
        )
        values = {name: compute(evaluation.counts) for name, compute in METRICS.items()}
        for name, compute in EVALUATION_METRICS.items():
            values[name] = _drop_non_finite(compute(evaluation))
        return EvaluationMetrics(**values)

    def _add_log_likelihoods(self, logits: Tensor, *, targets: Tensor) -> None:
        by_cell = [
            torch.log_softmax(shifted, dim=0).gather(0, targets)
            for shifted in (logits, logits - self._log_prior)
        ]
        # A product and not a scatter, which a GPU would add up in another order each time.
        self._log_likelihoods += torch.cat(by_cell) @ self._one_hot[targets.view(-1)]


def compute_log_prior(counts: Tensor, *, class_weights: Tensor) -> Tensor:
    """log (w_c π_c), the prior that a classifier trained with weights w_c on colours with the
    frequencies π_c has learnt, (10,); less it, logits are those of a balanced classifier (Saerens
    et al., 2002; Menon et al., 2021).

    `counts` (10,) are the cells of each colour in the training split. A colour that has none counts
    as one cell with weight 1, so that every value is finite. For a focal loss, which does not learn
    the true probabilities, the correction is approximate.
    """
    weighted = torch.where(counts > 0, counts * class_weights.double().to(counts.device), 1.0)
    return (weighted / counts.sum()).log().float()


def _mean_over_colours(evaluation: Evaluation, values: list[float]) -> float | None:
    """Of the foreground colours that occur; None without foreground."""
    shares = evaluation.scores.prevalences
    present = [value for value, share in zip(values[1:], shares[1:], strict=True) if share]
    return sum(present) / len(present) if present else None


def _read_match(evaluation: Evaluation, read: Callable[[Match], float | None]) -> float | None:
    match = evaluation.scores.match
    return None if match is None else read(match)


def _drop_non_finite(value: Any) -> Any:
    """None for a number that is not finite, or for a list with one: no database has it."""
    numbers = value if isinstance(value, list) else [value]
    return value if all(n is None or math.isfinite(n) for n in numbers) else None
