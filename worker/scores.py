"""Scores of cells: how well a model's logits rank the colours, wherever argmax draws the line.

The scores of a split are counted in histograms on the device. Nothing leaves it before the end,
and all shapes are fixed, so that the counting can be captured as a graph.

**Bins.** Each score has a centre: its mean over the cells of its class in the first batch, since
thresholds count where these are. A bin holds the cells whose distance to the centre rounds to the
same half-precision number. Two cells are a tie only if their logits differ by less than 1/1024 of
their distance to the centre (within 6e-5 of the centre: by less than 6e-8), and any larger
difference is ranked right, however little a model's outputs vary. Rounding keeps the order, so a
bin acts as one threshold.

**Errors**, held by tests against scikit-learn with the exact scores: at most 3e-4 in average
precision and in what is matched, down to models whose logits vary by no more than 1e-4 (below
that the logits' own rounding shows). The shift is as exact as the bins.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.models.configuration import NUM_COLOURS

_NUM_BINS: Final = 2**16  # one for each half-precision number
_MAGNITUDE: Final = 2**15 - 1
_NUM_NANS: Final = 2**10 - 1  # at each end of a histogram
#: The histograms by colour: of all cells, and of the cells that have the colour.
_ALL, _OWN = 0, 1
#: By margin: background, foreground whose best colour is right, foreground whose best is wrong.
_BACKGROUND, _RIGHT, _WRONG = 0, 1, 2

Histogram = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Reconstructions whose painted share is that of the grids.

    `shift` is subtracted from the background's logit, so a positive one paints more cells. The
    rest is as the metrics of the same names, with each cell's colour predicted after the shift.
    """

    shift: float
    recall: float
    precision: float | None
    iou: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the order of the scores says of a split.

    Of 10 classes, one against the rest: the foreground by 1 - p_0, then colours 1 to 9 by p_c.
    `average_precisions` are NaN for a class without cells, or if a score is no number.
    `prevalences` are the classes' shares of the cells, and the average precisions of random scores.
    """

    average_precisions: list[float]
    prevalences: list[float]
    match: Match | None


class ScoreSums:
    """The histograms of a split, on the device. Tensors keep their addresses; bins are in falling
    order of the score."""

    def __init__(self, *, device: torch.device) -> None:
        # 32 bits are enough for 8 million grids.
        shape = 2, NUM_COLOURS, _NUM_BINS
        self._by_colour = torch.zeros(shape, dtype=torch.int32, device=device)
        self._by_margin = torch.zeros((3, _NUM_BINS), dtype=torch.int32, device=device)
        self._colour_centres = torch.zeros(NUM_COLOURS, 1, device=device)
        self._margin_centre = torch.zeros(1, 1, device=device)
        self._colours = torch.arange(NUM_COLOURS, device=device).unsqueeze(1)
        # Leaves one colour out of a sum.
        self._others = 1.0 - torch.eye(NUM_COLOURS, device=device)
        self._is_empty = True

    def reset(self) -> None:
        self._by_colour.zero_()
        self._by_margin.zero_()
        self._is_empty = True

    def add(self, logits: Tensor, *, targets: Tensor) -> None:
        """Count N cells: `logits` (10, N) and `targets` (1, N), int64."""
        scores = self._compute_scores(logits)
        best, colours = find_best_foreground(logits)
        margins = best - logits[:1]
        if self._is_empty:
            self._is_empty = False
            self._choose_centres(scores, margins=margins, targets=targets)
        bins = _find_bins(scores, centre=self._colour_centres).add_(self._colours * _NUM_BINS)
        _count(self._by_colour[_ALL], bins)
        _count(self._by_colour[_OWN], bins.gather(0, targets))
        labels = torch.where(targets == 0, _BACKGROUND, _RIGHT + (colours != targets).long())
        margin_bins = _find_bins(margins, centre=self._margin_centre)
        _count(self._by_margin, labels * _NUM_BINS + margin_bins)

    def measure(self) -> Scores:
        of_all, of_own = self._by_colour
        # The foreground is all that is not background.
        of_own = torch.cat([of_all[:1] - of_own[:1], of_own[1:]])
        return Scores(
            average_precisions=compute_average_precisions(of_own, of_all=of_all).tolist(),
            prevalences=(of_own.sum(1).double() / of_all.sum(1)).tolist(),
            match=find_match(self._by_margin.cpu().numpy(), centre=self._margin_centre.item()),
        )

    def _choose_centres(self, scores: Tensor, *, margins: Tensor, targets: Tensor) -> None:
        is_own = targets == self._colours
        is_own[0].logical_not_()
        self._colour_centres.copy_(_mean_of(scores, is_own))
        self._margin_centre.copy_(_mean_of(margins, is_own[:1]))

    def _compute_scores(self, logits: Tensor) -> Tensor:
        """The logits of 1 - p_0 and of p_1 to p_9, (10, N) as `logits`.

        The odds of the other colours are added up, in one product, and not subtracted from all,
        which would leave nothing of them where p is nearly 1.
        """
        shifted = logits - logits.amax(0, keepdim=True)
        scores: Tensor = shifted - (self._others @ shifted.exp()).log_()
        scores[0].neg_()
        return scores


def compute_average_precisions(of_own: Tensor, *, of_all: Tensor) -> Tensor:
    """Σ_n (R_n - R_{n-1}) P_n over thresholds from high to low, (K,), as scikit-learn's
    `average_precision_score` has it; a bin is one threshold, so that its cells are ties.

    Both are (K, bins) in falling order of the score: the cells of each of K classes, and all cells.
    """
    num_found = of_own.cumsum(1, dtype=torch.int32)
    num_above = of_all.cumsum(1, dtype=torch.int32)
    precisions = num_found / num_above.clamp_(min=1)
    # Without cells of the class this is 0 / 0.
    averages = (precisions * of_own).sum(1) / num_found[:, -1]
    has_nan = (of_all[:, :_NUM_NANS] + of_all[:, -_NUM_NANS:]).any(1)
    return averages.masked_fill(has_nan, torch.nan)


def find_match(by_margin: Histogram, *, centre: float) -> Match | None:
    """The threshold at which the painted share is nearest to the true one; of two the one that
    paints less. It lies half way between two bins that have cells.

    `by_margin` (3, bins) is in falling order of max(logits[1:]) - logits[0], less `centre`. None
    without foreground, or if a margin is no number.
    """
    num_cells, num_foreground = int(by_margin.sum()), int(by_margin[_RIGHT:].sum())
    has_nan = by_margin[:, :_NUM_NANS].any() or by_margin[:, -_NUM_NANS:].any()
    if not num_foreground or has_nan:
        return None
    # Column k: what is painted if the first k bins that have cells are.
    filled = np.flatnonzero(by_margin.any(0))
    painted = np.zeros((3, len(filled) + 1), dtype=np.int64)
    by_margin[:, filled].cumsum(1, out=painted[:, 1:])
    k = int(np.abs(painted.sum(0) - num_foreground).argmin())
    num_false, num_right, num_wrong = painted[:, k].tolist()
    num_painted = num_false + num_right + num_wrong
    num_black = num_cells - num_foreground - num_false
    return Match(
        shift=-(centre + _find_threshold(filled, k)),
        recall=num_right / num_foreground,
        precision=num_right / num_painted if num_painted else None,
        iou=num_right / (num_foreground + num_false),
        accuracy=(num_right + num_black) / num_cells,
    )


def find_best_foreground(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest foreground logit of each cell and its colour, of several the first, both
    (1, N) for `logits` (10, N). Five times as quick as `max` on a CPU."""
    foreground = logits[1:]
    best = foreground.amax(0, keepdim=True)
    ranks = torch.arange(NUM_COLOURS - 1, 0, -1, dtype=torch.uint8, device=logits.device)
    first = ((foreground == best) * ranks.unsqueeze(1)).amax(0, keepdim=True)
    return best, NUM_COLOURS - first.long()


def _mean_of(scores: Tensor, is_own: Tensor) -> Tensor:
    """Mean of each row's own scores, (K, 1); of all if it has none."""
    is_used = is_own | ~is_own.any(1, keepdim=True)
    return torch.where(is_used, scores, 0.0).sum(1, keepdim=True) / is_used.sum(1, keepdim=True)


def _find_bins(scores: Tensor, *, centre: Tensor) -> Tensor:
    """The bin of each score, 0 to 2^16 - 1. Scores that are not finite have one, too, so that no
    index is ever out of range."""
    bits = (centre - scores).half().view(torch.int16)
    # Among negative numbers the bits of the magnitude rise where the number falls.
    ordered = bits ^ ((bits >> 15) & _MAGNITUDE)
    return ordered.long().add_(_NUM_BINS // 2)


def _count(histogram: Tensor, bins: Tensor) -> None:
    bins = bins.flatten()
    histogram.view(-1).scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.int32))


def _list_bin_values() -> npt.NDArray[np.float64]:
    """The distance from the centre that each bin stands for."""
    magnitudes = np.arange(_NUM_BINS // 2, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        positive = magnitudes.astype(np.float64)
    return np.concatenate([positive[::-1], -positive])


_BIN_VALUES: Final = _list_bin_values()


def _find_threshold(filled: npt.NDArray[np.int64], k: int) -> float:
    """The number half way between the k-th of the `filled` bins and the next one. At an end the
    other bin is its neighbour, which is empty."""
    above = filled[k - 1] if k else filled[0] - 1
    below = filled[k] if k < len(filled) else filled[-1] + 1
    return float(_BIN_VALUES[[above, below]].mean())
