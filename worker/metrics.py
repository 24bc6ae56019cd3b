"""What is counted during an epoch, and the figures that are made of it once at the end."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from worker.losses import GridLoss
from worker.model import NUM_COLOURS

ACTIVE_UNIT_NATS = 0.05
SPIKE_RATIO = 3.0
SPIKE_WINDOW = 50
_MIN_SPIKE_HISTORY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMetrics:
    """Figures of one pass over a split; the columns of `EpochMetrics` without their prefix.

    A foreground cell counts as recalled, and as intersection, if its very colour is
    predicted; the union is every cell that is or is predicted foreground.
    """

    loss: float
    recon_loss: float
    kl_loss: float
    pixel_accuracy: float
    foreground_recall: float | None
    foreground_iou: float | None
    balanced_accuracy: float | None
    background_share: float
    all_black_share: float
    exact_grid_rate: float
    recall_per_colour: list[float | None]
    kl_per_dimension: list[float]
    active_units: int


class MetricSums:
    """Sums over the grids of a split, kept on the device and read once."""

    def __init__(self, *, latent_dim: int, device: torch.device) -> None:
        self._device = device
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.kl_per_dimension = torch.zeros(latent_dim, dtype=torch.float64, device=device)
        # [true colour, predicted colour] -> cells; grids: all, all black, exact.
        self.confusion = torch.zeros(NUM_COLOURS**2, dtype=torch.int64, device=device)
        self.grids = torch.zeros(3, dtype=torch.int64, device=device)

    def reset(self) -> None:
        for name in self._names:
            getattr(self, name).zero_()

    @torch.no_grad()
    def add(self, loss: GridLoss, *, logits: Tensor, grids: Tensor) -> None:
        """Count a batch: `logits` (B, 10, S, S) for `grids` (B, S, S)."""
        predicted = logits.argmax(1)
        cells = (grids.long() * NUM_COLOURS + predicted).flatten()
        self.confusion.scatter_add_(0, cells, torch.ones_like(cells))
        all_black = (predicted == 0).flatten(1).all(1).sum()
        exact = (predicted == grids).flatten(1).all(1).sum()
        self.grids += torch.stack([torch.full_like(exact, len(grids)), all_black, exact])
        self.losses += torch.stack([loss.total.sum(), loss.recon.sum(), loss.kl.sum()])
        self.kl_per_dimension += loss.kl_per_dimension.sum(0)

    def compute(self) -> SplitMetrics:
        """Divide the sums; the only place where they leave the device."""
        confusion = self.confusion.view(NUM_COLOURS, NUM_COLOURS).cpu().numpy()
        num_grids, num_black, num_exact = self.grids.tolist()
        loss, recon_loss, kl_loss = (self.losses / num_grids).tolist()
        kl_per_dimension = (self.kl_per_dimension / num_grids).tolist()
        recalls = compute_recall_per_colour(confusion)
        seen = [recall for recall in recalls if recall is not None]
        hits = int(np.trace(confusion[1:, 1:]))
        foreground = int(confusion[1:].sum())
        union = foreground + int(confusion[0, 1:].sum())
        return SplitMetrics(
            loss=loss,
            recon_loss=recon_loss,
            kl_loss=kl_loss,
            pixel_accuracy=int(np.trace(confusion)) / int(confusion.sum()),
            foreground_recall=hits / foreground if foreground else None,
            foreground_iou=hits / union if union else None,
            balanced_accuracy=sum(seen) / len(seen) if seen else None,
            background_share=int(confusion[:, 0].sum()) / int(confusion.sum()),
            all_black_share=num_black / num_grids,
            exact_grid_rate=num_exact / num_grids,
            recall_per_colour=recalls,
            kl_per_dimension=kl_per_dimension,
            active_units=sum(kl > ACTIVE_UNIT_NATS for kl in kl_per_dimension),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in self._names}

    def load_state_dict(self, state: dict[str, Tensor]) -> Self:
        for name in self._names:
            getattr(self, name).copy_(state[name])
        return self

    _names = ("losses", "kl_per_dimension", "confusion", "grids")


def compute_recall_per_colour(confusion: np.ndarray) -> list[float | None]:
    """Recall of each colour from a (10, 10) confusion matrix; absent colours have none."""
    return [
        int(row[colour]) / int(row.sum()) if row.sum() else None
        for colour, row in enumerate(confusion)
    ]


def compute_spike_ratios(step_losses: np.ndarray) -> np.ndarray:
    """Each step's loss over the median of the up to 50 steps before it.

    The first five steps have too short a past and are left out, so the result is empty for
    shorter epochs.
    """
    num_short = min(SPIKE_WINDOW, len(step_losses))
    medians = np.array([np.median(step_losses[:i]) for i in range(_MIN_SPIKE_HISTORY, num_short)])
    if len(step_losses) > SPIKE_WINDOW:
        # All at once: one by one they would keep a GPU waiting for 20 ms an epoch.
        windows = np.lib.stride_tricks.sliding_window_view(step_losses[:-1], SPIKE_WINDOW)
        medians = np.concatenate([medians, np.median(windows, axis=1)])
    ratios: np.ndarray = step_losses[_MIN_SPIKE_HISTORY:] / medians
    return ratios
