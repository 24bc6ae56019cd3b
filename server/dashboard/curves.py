"""Curves for the pages: reduced to a few hundred points each, without losing a peak."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.judging.histories import EpochSummary
from server.judging.thinning import MAX_POINTS, Values, find_num_points, thin
from server.models.epochs import EpochMetrics

MAX_HEAT_CELLS = 20_000

#: The curves on a job's page, named as in its epoch events.
JOB_CURVES = (
    "train_loss",
    "train_recon_loss",
    "train_kl_loss",
    "val_loss",
    "val_recon_loss",
    "train_pixel_accuracy",
    "val_pixel_accuracy",
    "train_foreground_recall",
    "val_foreground_recall",
    "val_foreground_precision",
    "val_foreground_iou",
    "train_background_share",
    "val_background_share",
    "val_foreground_share",
    "val_foreground_ap",
    "val_colour_ap",
    "val_colour_prevalence",
    "val_matched_iou",
    "val_mutual_information",
    "val_mutual_information_error",
    "beta",
    "learning_rate",
)


def draw_job(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    """All curves of a job, and its KL per dimension for the heat map."""
    numbers = [row.epoch for row in epochs]
    curves = {
        name: _make_curve(numbers, _as_array([getattr(row, name) for row in epochs]))
        for name in JOB_CURVES
    }
    return {"curves": curves, "kl": _draw_heat(epochs)}


def draw_history(epochs: Sequence[EpochSummary], *, num_jobs: int) -> dict[str, Any]:
    """The curves of one job in a comparison."""
    limit = find_num_points(num_jobs)
    columns = {
        "train_loss": _as_array([row.train_loss for row in epochs]),
        "train_pixel_accuracy": _as_array([row.train_pixel_accuracy for row in epochs]),
        "val_foreground_recall": _as_array([row.val_foreground_recall for row in epochs]),
        "val_foreground_iou": _as_array([row.val_foreground_iou for row in epochs]),
        "painted_share": 1 - _as_array([row.val_background_share for row in epochs]),
        "val_foreground_ap": _as_array([row.val_foreground_ap for row in epochs]),
        "val_colour_ap": _as_array([row.val_colour_ap for row in epochs]),
        "val_mutual_information": _as_array([row.val_mutual_information for row in epochs]),
    }
    numbers = [row.epoch for row in epochs]
    curves = {name: _make_curve(numbers, values, limit=limit) for name, values in columns.items()}
    return curves | _draw_kl(epochs, limit=limit)


def _draw_kl(epochs: Sequence[EpochSummary], *, limit: int) -> dict[str, Any]:
    """The mean KL of the dimensions and that of the weakest, at the epochs of which it was read."""
    known = [row for row in epochs if row.val_kl_total is not None]
    num_dimensions = len(known[-1].val_kl_per_dimension) if known else 1
    numbers = [row.epoch for row in known]
    mean = _as_array([row.val_kl_total for row in known]) / max(1, num_dimensions)
    weakest = _as_array([row.val_kl_min for row in known])
    return {
        "mean_kl": _make_curve(numbers, mean, limit=limit),
        "min_kl": _make_curve(numbers, weakest, limit=limit),
    }


def choose_heat(epochs: Sequence[EpochMetrics], *, num_dimensions: int) -> list[EpochMetrics]:
    """The epochs of the heat map, oldest first."""
    step = math.ceil(len(epochs) * max(1, num_dimensions) / MAX_HEAT_CELLS) or 1
    # Every `step`-th epoch, counted from the end: the newest epoch is the judged one.
    return list(reversed(epochs[::-1][::step]))


def _draw_heat(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    num_dimensions = len(epochs[-1].val_kl_per_dimension) if epochs else 1
    shown = choose_heat(epochs, num_dimensions=num_dimensions)
    return {
        "epochs": [row.epoch for row in shown],
        "values": [_round(_as_array(row.val_kl_per_dimension)) for row in shown],
    }


def _make_curve(
    epochs: Sequence[int], values: Values, *, limit: int = MAX_POINTS
) -> list[list[Any]]:
    """Epochs and values as two lists; a missing value is None. Of a curve without any value only
    its ends are kept."""
    kept = thin(values, limit=2 if np.isnan(values).all() else limit)
    return [[epochs[i] for i in kept], _round(values[kept])]


def _as_array(values: Sequence[float | None]) -> Values:
    return np.array(values, dtype=np.float64)


def _round(values: Values) -> list[float | None]:
    """Round to five digits, finer than any screen; None for values that are not finite."""
    sizes = np.abs(np.where(np.isfinite(values) & (values != 0), values, 1.0))
    # Scaled to five digits; an integer divided by a power of ten has the shortest text.
    scales = 10.0 ** np.clip(4 - np.floor(np.log10(sizes)), 0, 22)
    rounded = np.where(np.isfinite(values), np.round(values * scales) / scales, np.nan)
    return [value if value == value else None for value in rounded.tolist()]
