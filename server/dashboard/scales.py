"""Axes of drawings: where a value lies, and the values that are written beside them."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from server.judging.thinning import Values

_MAX_STEPS: Final = 4
_EPOCH_STEPS: Final = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250)
_MAX_EPOCH_TICKS: Final = 6
#: The lowest KL that is shown; everything below it is as good as zero.
_LOWEST_LOG: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Scale:
    """The axis of a value, from `low` to `high`; values beyond an end are shown at the end."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, values: Values) -> Values:
        """Each value as a share of the axis, 0 to 1; NaN stays NaN."""
        shown = np.clip(values, self.low, self.high)
        if self.is_log:
            shares: Values = np.log(shown / self.low) / math.log(self.high / self.low)
            return shares
        return (shown - self.low) / (self.high - self.low)

    def place_one(self, value: float) -> float:
        return float(self.place(np.array([value]))[0])


def make_linear_scale(low: float, high: float) -> Scale:
    """At least from `low` to `high`, with round ends and a few round values between them."""
    span = high - low if high > low else max(abs(high), 1.0)
    step = _find_step(span / _MAX_STEPS)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def make_share_scale() -> Scale:
    return Scale(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def make_log_scale(high: float) -> Scale:
    """From a thousandth to at least `high`, in powers of ten."""
    last = max(0, math.ceil(math.log10(high) - 1e-9)) if high > 0 else 0
    ticks = tuple(10.0**power for power in range(round(math.log10(_LOWEST_LOG)), last + 1))
    return Scale(ticks[0], ticks[-1], ticks, is_log=True)


def make_epoch_scale(num_epochs: int) -> Scale:
    """From the first epoch to the last; a single epoch is in the middle."""
    if num_epochs <= 1:
        return Scale(0.0, 2.0, (1.0,))
    allowed = (step for step in _EPOCH_STEPS if num_epochs / step <= _MAX_EPOCH_TICKS)
    step = next(allowed, _EPOCH_STEPS[-1])
    ticks = [float(epoch) for epoch in range(step, num_epochs + 1, step)]
    return Scale(1.0, float(num_epochs), tuple(dict.fromkeys([1.0, *ticks])))


def _find_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((each * power for each in (1, 2, 5) if each * power >= least * 0.999), 10 * power)
