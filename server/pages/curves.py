"""The curves of the pages: a few hundred points each, in which every peak is still there."""

import math
from collections.abc import Sequence
from typing import Any

from server.histories import JudgedEpoch
from server.models import EpochMetrics

MAX_POINTS = 500
MIN_POINTS = 200
#: Points of one panel of a comparison, all jobs together.
MAX_PANEL_POINTS = 20_000
MAX_HEAT_CELLS = 20_000

#: What the page of a job draws of each epoch, named as in its events.
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
    "val_foreground_iou",
    "beta",
    "learning_rate",
)

Value = float | None
Points = list[tuple[int, Value]]


def thin(points: Points, *, limit: int) -> Points:
    """At most `limit` points: the first, the last, and of each stretch between them the lowest and
    the highest."""
    if len(points) <= limit:
        return points
    inner = points[1:-1]
    num_stretches = (limit - 2) // 2
    kept = [points[0]]
    for index in range(num_stretches):
        start, stop = (len(inner) * i // num_stretches for i in (index, index + 1))
        stretch = [point for point in inner[start:stop] if point[1] is not None]
        if stretch:
            ends = {min(stretch, key=_height), max(stretch, key=_height)}
            kept += sorted(ends, key=lambda point: point[0])
    return [*kept, points[-1]]


def draw_job(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    """All curves of a job, and its KL by dimension for the heat map."""
    curves = {
        name: _columns([(row.epoch, _round(getattr(row, name))) for row in epochs])
        for name in JOB_CURVES
    }
    return {"curves": curves, "kl": _draw_heat(epochs)}


def draw_history(epochs: Sequence[JudgedEpoch], *, num_jobs: int) -> dict[str, Any]:
    """What a comparison overlays of one of its jobs."""
    limit = min(MAX_POINTS, max(MIN_POINTS, MAX_PANEL_POINTS // num_jobs))
    kl = [row.val_kl_per_dimension for row in epochs]
    columns: dict[str, Sequence[Value]] = {
        "train_loss": [row.train_loss for row in epochs],
        "train_pixel_accuracy": [row.train_pixel_accuracy for row in epochs],
        "val_foreground_recall": [row.val_foreground_recall for row in epochs],
        "val_foreground_iou": [row.val_foreground_iou for row in epochs],
        "mean_kl": [sum(values) / len(values) if values else None for values in kl],
        "min_kl": [min(values, default=None) for values in kl],
    }
    numbers = [row.epoch for row in epochs]
    return {
        name: _columns(list(zip(numbers, map(_round, values), strict=True)), limit=limit)
        for name, values in columns.items()
    }


def _draw_heat(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    num_dimensions = len(epochs[-1].val_kl_per_dimension) if epochs else 1
    step = math.ceil(len(epochs) * max(1, num_dimensions) / MAX_HEAT_CELLS) or 1
    # Counted from the end: the newest epoch is the one that is judged.
    shown = list(reversed(epochs[::-1][::step]))
    return {
        "epochs": [row.epoch for row in shown],
        "values": [[_round(value) for value in row.val_kl_per_dimension] for row in shown],
    }


def _columns(points: Points, *, limit: int = MAX_POINTS) -> list[list[Any]]:
    thinned = thin(points, limit=limit)
    return [[epoch for epoch, _ in thinned], [value for _, value in thinned]]


def _height(point: tuple[int, Value]) -> float:
    value = point[1]
    assert value is not None
    return value


def _round(value: Value) -> Value:
    """Five digits are finer than any screen; what is not finite is not drawn."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
