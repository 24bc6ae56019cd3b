"""Intervals of paired differences between two arms. They are shown, and decide nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

#: Fewer paired differences have no interval.
MIN_PAIRS: Final = 5
#: Of the largest difference: a smaller spread is rounding, and BCa would divide by about 0.
SMALLEST_SPREAD: Final = 1e-9


@dataclass(frozen=True)
class PairedDifference:
    """The median of first - second over pairs of one seed, with its interval, in their unit."""

    median: float
    low: float
    high: float
    num_pairs: int
    method: str


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 9999,
) -> PairedDifference | None:
    """The median of first - second over pairs of one seed, in their unit, with its interval.

    The interval is by the bootstrap, BCa (Efron, 1987), or of percentiles where BCa has no answer.
    Pairs with a value that is not finite are left out. None below five pairs. Raises ValueError if
    the lengths differ, and for a confidence outside 0 to 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is between 0 and 1, not {confidence}")
    pairs = zip(first, second, strict=True)
    differences = [one - other for one, other in pairs if math.isfinite(one - other)]
    if len(differences) < MIN_PAIRS:
        return None
    scale = max(map(abs, differences)) or 1.0
    scaled = [difference / scale for difference in differences]
    method = "percentile" if _is_bca_degenerate(scaled) else "BCa"
    low, high = _bootstrap(
        scaled, method=method, confidence=confidence, num_resamples=num_resamples
    )
    return PairedDifference(
        median(differences), low * scale, high * scale, len(differences), method
    )


def _is_bca_degenerate(scaled: Sequence[float]) -> bool:
    """Whether the median is the same whichever value is left out: BCa divides by its spread."""
    ordered = sorted(scaled)
    medians = [median(ordered[:i] + ordered[i + 1 :]) for i in range(len(ordered))]
    return max(medians) - min(medians) < SMALLEST_SPREAD


def _bootstrap(
    differences: Sequence[float], *, method: str, confidence: float, num_resamples: int
) -> tuple[float, float]:
    """The interval of the median, from the same resamples each time."""
    import numpy as np  # noqa: PLC0415 - slow to import; few commands decide
    from scipy.stats import bootstrap  # noqa: PLC0415 - slow to import; few commands decide

    interval = bootstrap(
        (differences,),
        np.median,
        confidence_level=confidence,
        n_resamples=num_resamples,
        method=method,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
