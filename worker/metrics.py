"""Metrics of a split: what is counted during an epoch, and the values computed from it at the end.

A new metric is one function registered with `@metric`, its field in `SplitMetrics`, and its columns
in `server.models.epochs.EpochMetrics` with a migration. Metrics of validation and test alone are in
`worker.evaluation`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from server.models.configuration import NEGLIGIBLE_LOSS, NUM_COLOURS
from worker.losses import GridLoss

ACTIVE_UNIT_NATS: Final = 0.05
SPIKE_RATIO: Final = 3.0
SPIKE_WINDOW: Final = 50
_MIN_SPIKE_HISTORY: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMetrics:
    """Metrics of one pass over a split; the columns of `EpochMetrics` without their prefix."""

    loss: float
    recon_loss: float
    kl_loss: float
    pixel_accuracy: float
    foreground_recall: float | None
    foreground_iou: float | None
    balanced_accuracy: float | None
    background_share: float
    foreground_share: float
    foreground_precision: float | None
    foreground_iou_any_colour: float | None
    colour_iou: float | None
    all_black_share: float
    exact_grid_rate: float
    recall_per_colour: list[float | None]
    kl_per_dimension: list[float]
    active_units: int


@dataclass(frozen=True)
class Counts:
    """What was counted over the grids of a split, on the host.

    A foreground cell counts as a hit if exactly its colour is predicted; the union is every cell
    that is or is predicted foreground.
    """

    confusion: np.ndarray  # (10, 10) cells by true and predicted colour
    num_grids: int
    num_all_black: int
    num_exact: int
    losses: list[float]  # total, reconstruction and KL: means over the grids
    kl_per_dimension: list[float]  # nats, mean over the grids

    @cached_property
    def num_cells(self) -> int:
        return int(self.confusion.sum())

    @cached_property
    def num_foreground(self) -> int:
        return int(self.confusion[1:].sum())

    @cached_property
    def num_foreground_hits(self) -> int:
        return int(np.trace(self.confusion[1:, 1:]))

    @cached_property
    def num_painted(self) -> int:
        return int(self.confusion[:, 1:].sum())

    @cached_property
    def num_foreground_union(self) -> int:
        return self.num_foreground + int(self.confusion[0, 1:].sum())


Compute = TypeVar("Compute", bound=Callable[[Counts], Any])

#: Every metric of a split, by the name of its field and column.
METRICS: Final[dict[str, Callable[[Counts], Any]]] = {}


def metric(compute: Compute) -> Compute:
    """Register a function as the metric of its name."""
    METRICS[compute.__name__] = compute
    return compute


@metric
def loss(counts: Counts) -> float:
    """The whole objective, mean over the grids."""
    return counts.losses[0]


@metric
def recon_loss(counts: Counts) -> float:
    """The reconstruction term of the objective."""
    return counts.losses[1]


@metric
def kl_loss(counts: Counts) -> float:
    """The KL term of the objective, before β."""
    return counts.losses[2]


@metric
def pixel_accuracy(counts: Counts) -> float:
    """Cells whose colour is predicted, of all cells."""
    return int(np.trace(counts.confusion)) / counts.num_cells


@metric
def foreground_recall(counts: Counts) -> float | None:
    """Foreground cells whose colour is predicted, of all foreground cells."""
    return _divide(counts.num_foreground_hits, counts.num_foreground)


@metric
def foreground_iou(counts: Counts) -> float | None:
    """Foreground hits, of all cells that are or are predicted foreground (Jaccard index)."""
    return _divide(counts.num_foreground_hits, counts.num_foreground_union)


@metric
def foreground_share(counts: Counts) -> float:
    """Foreground cells, of all cells: the truth that 1 - `background_share` is compared with."""
    return counts.num_foreground / counts.num_cells


@metric
def foreground_precision(counts: Counts) -> float | None:
    """Cells that are predicted foreground and have exactly the predicted colour, of all that are
    predicted foreground."""
    return _divide(counts.num_foreground_hits, counts.num_painted)


@metric
def foreground_iou_any_colour(counts: Counts) -> float | None:
    """Cells that are and are predicted foreground, in whatever colour, of all that are or are
    predicted foreground."""
    return _divide(int(counts.confusion[1:, 1:].sum()), counts.num_foreground_union)


@metric
def colour_iou(counts: Counts) -> float | None:
    """Mean over the foreground colours that occur in the grids or the reconstructions: cells that
    are and are predicted the colour, of all that are or are predicted the colour."""
    hits = np.diagonal(counts.confusion)
    unions = counts.confusion.sum(0) + counts.confusion.sum(1) - hits
    occurs = unions[1:] > 0
    if not occurs.any():
        return None
    return float((hits[1:][occurs] / unions[1:][occurs]).mean())


@metric
def balanced_accuracy(counts: Counts) -> float | None:
    """Mean recall over the colours that occur."""
    seen = [recall for recall in recall_per_colour(counts) if recall is not None]
    return sum(seen) / len(seen) if seen else None


@metric
def background_share(counts: Counts) -> float:
    """Cells that are predicted background, of all cells."""
    return int(counts.confusion[:, 0].sum()) / counts.num_cells


@metric
def all_black_share(counts: Counts) -> float:
    """Grids whose reconstruction is all background."""
    return counts.num_all_black / counts.num_grids


@metric
def exact_grid_rate(counts: Counts) -> float:
    """Grids whose reconstruction is right in every cell."""
    return counts.num_exact / counts.num_grids


@metric
def recall_per_colour(counts: Counts) -> list[float | None]:
    """Recall of each colour; a colour that does not occur has none."""
    return [
        _divide(int(row[colour]), int(row.sum())) for colour, row in enumerate(counts.confusion)
    ]


@metric
def kl_per_dimension(counts: Counts) -> list[float]:
    """Mean KL of each latent dimension, in nats."""
    return counts.kl_per_dimension


@metric
def active_units(counts: Counts) -> int:
    """Latent dimensions with a KL above 0.05 nats."""
    return sum(kl > ACTIVE_UNIT_NATS for kl in counts.kl_per_dimension)


def _divide(part: int, whole: int) -> float | None:
    return part / whole if whole else None


class MetricSums:
    """Sums over the grids of a split, kept on the device and read once."""

    def __init__(self, *, latent_dim: int, device: torch.device) -> None:
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.kl_per_dimension = torch.zeros(latent_dim, dtype=torch.float64, device=device)
        # [true colour, predicted colour] -> cells; grids: all, all black, exact.
        self.confusion = torch.zeros(NUM_COLOURS**2, dtype=torch.int64, device=device)
        self.grids = torch.zeros(3, dtype=torch.int64, device=device)

    def reset(self) -> None:
        for name in self._names:
            getattr(self, name).zero_()

    @torch.no_grad()
    def add(self, batch: "BatchCounts") -> None:
        for name in self._names:
            getattr(self, name).add_(getattr(batch, name))

    def compute(self) -> SplitMetrics:
        counts = self.read()
        return SplitMetrics(**{name: compute(counts) for name, compute in METRICS.items()})

    def read(self) -> Counts:
        """The sums and counts so far; the only place where they leave the device."""
        num_grids, num_all_black, num_exact = self.grids.tolist()
        return Counts(
            confusion=self.confusion.view(NUM_COLOURS, NUM_COLOURS).cpu().numpy(),
            num_grids=num_grids,
            num_all_black=num_all_black,
            num_exact=num_exact,
            losses=(self.losses / num_grids).tolist(),
            kl_per_dimension=(self.kl_per_dimension / num_grids).tolist(),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in self._names}

    def load_state_dict(self, state: dict[str, Tensor]) -> Self:
        for name in self._names:
            getattr(self, name).copy_(state[name])
        return self

    _names = ("losses", "kl_per_dimension", "confusion", "grids")


class BatchCounts(NamedTuple):
    """What a batch adds to `MetricSums`, field by field."""

    losses: Tensor
    kl_per_dimension: Tensor
    confusion: Tensor
    grids: Tensor


@torch.no_grad()
def count_batch(loss: GridLoss, *, logits: Tensor, grids: Tensor) -> BatchCounts:
    """Count a batch: `logits` (B, 10, S, S) for `grids` (B, S, S)."""
    predicted = logits.argmax(1)
    all_black = (predicted == 0).flatten(1).all(1).sum()
    exact = (predicted == grids).flatten(1).all(1).sum()
    return BatchCounts(
        losses=torch.stack([loss.total.sum(), loss.recon.sum(), loss.kl.sum()]),
        kl_per_dimension=loss.kl_per_dimension.sum(0),
        confusion=_count_cells(grids.flatten().long(), predicted=predicted.flatten()),
        grids=torch.stack([torch.full_like(exact, len(grids)), all_black, exact]),
    )


def _count_cells(true: Tensor, *, predicted: Tensor) -> Tensor:
    """Cells by true and predicted colour, (100,), of the colours (N,) of N cells."""
    if true.device.type != "cpu":
        return count_by_product(true, predicted=predicted)
    counts = torch.zeros(NUM_COLOURS**2, dtype=torch.int64)
    return counts.scatter_add_(0, true * NUM_COLOURS + predicted, torch.ones_like(true))


def count_by_product(true: Tensor, *, predicted: Tensor) -> Tensor:
    """As the above for a GPU, nearly all of whose threads would otherwise add to one number, since
    most cells are background. It is exact for fewer than 2**24 cells."""
    colours = torch.arange(NUM_COLOURS, device=true.device)
    rows, columns = ((cells.unsqueeze(1) == colours).float() for cells in (true, predicted))
    return (rows.t() @ columns).long().flatten()


def compute_spike_ratios(step_losses: np.ndarray) -> np.ndarray:
    """Each step's loss over the median of the up to 50 steps before it, or over `NEGLIGIBLE_LOSS`
    if that is more: of a loss of almost nothing, any change is as good as none.

    The first five steps have too few steps before them and are left out, so the result is empty
    for shorter epochs.
    """
    num_short = min(SPIKE_WINDOW, len(step_losses))
    medians = np.array([np.median(step_losses[:i]) for i in range(_MIN_SPIKE_HISTORY, num_short)])
    if len(step_losses) > SPIKE_WINDOW:
        # All at once: one by one they would keep a GPU waiting for 20 ms per epoch.
        windows = np.lib.stride_tricks.sliding_window_view(step_losses[:-1], SPIKE_WINDOW)
        medians = np.concatenate([medians, np.median(windows, axis=1)])
    floor = step_losses.dtype.type(NEGLIGIBLE_LOSS)
    ratios: np.ndarray = step_losses[_MIN_SPIKE_HISTORY:] / np.maximum(medians, floor)
    return ratios
