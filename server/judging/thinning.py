"""Curves with as many points as a picture can show, without losing a peak."""

from typing import Final

import numpy as np
import numpy.typing as npt

MAX_POINTS: Final = 500
_MIN_POINTS: Final = 120
#: Points of one panel of a comparison, all jobs together.
_MAX_PANEL_POINTS: Final = 12_000

Values = npt.NDArray[np.float64]


def find_num_points(num_curves: int) -> int:
    """The most points of a curve in a panel with this many curves."""
    return min(MAX_POINTS, max(_MIN_POINTS, _MAX_PANEL_POINTS // num_curves))


def thin(values: Values, *, limit: int) -> npt.NDArray[np.intp]:
    """Indices of at most `limit` points of a curve: the first, the last, and the lowest and highest
    point of each segment between them. A longer curve may lose points that are NaN."""
    if len(values) <= limit:
        return np.arange(len(values))
    if limit == 2:
        return np.array([0, len(values) - 1])
    num_segments = (limit - 2) // 2
    width = -(-(len(values) - 2) // num_segments)
    inner = np.full(num_segments * width, np.nan)
    inner[: len(values) - 2] = values[1:-1]
    segments = inner.reshape(num_segments, width)
    starts = 1 + width * np.arange(num_segments)
    lowest = starts + np.where(np.isnan(segments), np.inf, segments).argmin(axis=1)
    highest = starts + np.where(np.isnan(segments), -np.inf, segments).argmax(axis=1)
    has_any = ~np.isnan(segments).all(axis=1)
    return np.unique(np.concatenate([[0], lowest[has_any], highest[has_any], [len(values) - 1]]))
