"""The age of times in the database, corrected by what this process has seen itself.

A time in the database and the clock that it is compared with may be hours apart: a clock was set,
or a machine slept. Who has looked at a time before knows better: it changed after the last look at
the former one, and has been as it is since the first look at it.
"""

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf


@dataclass(frozen=True, slots=True)
class _Look:
    value: datetime
    first_at: float
    former_at: float  # the last look that did not find it; -inf if there was none


class AgeWatch:
    """Remembers when it looked at times, by a clock that is never set. Safe in several threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks: dict[Hashable, _Look] = {}
        self._looked_at = -inf
        self._lock = threading.Lock()

    def look(self, times: Mapping[Hashable, datetime]) -> None:
        """Look at all times that there are now; what is not among them is forgotten."""
        now = self._clock()
        with self._lock:
            self._looks = {key: self._look(key, value, now) for key, value in times.items()}
            self._looked_at = now

    def correct(self, key: Hashable, value: datetime, *, now: datetime) -> float:
        """Seconds from `value` to `now`, at least 0, within the bounds that this watch knows."""
        seconds = max(0.0, (now - value).total_seconds())
        with self._lock:
            look, looked_at = self._looks.get(key), self._looked_at
        at = self._clock()
        if look is None or look.value != value:  # new since the last look
            return min(seconds, at - looked_at)
        return min(max(seconds, at - look.first_at), at - look.former_at)

    def _look(self, key: Hashable, value: datetime, now: float) -> _Look:
        known = self._looks.get(key)
        if known is not None and known.value == value:
            return known
        return _Look(value, first_at=now, former_at=self._looked_at)
