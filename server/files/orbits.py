"""Orbits: which grids are the same but for a symmetry of the square.

The orbit of a grid is the set of its eight turned and reflected forms. A grid and its orbit are
known by 64-bit keys. Equal grids always have equal keys, so grids with different keys do differ.
Different grids share a key with a chance of about 1 in 10^18: among a million grids, a count of
equal ones is too high with a chance below 1 in a million.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

_NUM_SYMMETRIES: Final = 8
#: Grids are converted piece by piece: so many cells stay in the processor's cache.
_CHUNK_CELLS: Final = 2**15
# The constants of SplitMix64 (Steele, Lea and Flood, 2014), whose output function `_mix` is.
_STEP: Final = 0x9E3779B97F4A7C15
_FACTORS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class GridKeys(NamedTuple):
    """Of N grids, each (N,): two grids are equal if their `exact` keys are, and equal but for a
    symmetry if their `orbit` keys are."""

    exact: Keys
    orbit: Keys


class Overlap(NamedTuple):
    """How many grids occur in another set as they are, and how many under a symmetry."""

    exact: int
    by_orbit: int


def list_symmetries(size: int) -> npt.NDArray[np.int64]:
    """The eight symmetries of the square as gathers: (8, size²) cell indices, identity first."""
    cells = np.arange(size * size, dtype=np.int64).reshape(size, size)
    turned = [np.rot90(cells, turns) for turns in range(4)]
    return np.stack([form.reshape(-1) for form in turned + [each.T for each in turned]])


def compute_keys(grids: npt.NDArray[np.uint8]) -> GridKeys:
    """The keys of grids (N, S, S) of colours; the same on every machine and in every version.

    Each is a weighted sum of the cells, mixed. The key of an orbit is the smallest of its grids.
    """
    num_grids, size = grids.shape[:2]
    keys = GridKeys(*(np.empty(num_grids, dtype=np.uint64) for _ in range(2)))
    weights = _draw_weights(size)
    chunk_size = max(1, _CHUNK_CELLS // size**2)
    for first in range(0, num_grids, chunk_size):
        chunk = grids[first : first + chunk_size].reshape(-1, size * size)
        # The sums are whole numbers below 2^53, which float64 has exactly, in any order.
        sums = (chunk.astype(np.float64) @ weights).astype(np.uint64)
        low, high = sums[:, :_NUM_SYMMETRIES], sums[:, _NUM_SYMMETRIES:]
        of_forms = _mix(_mix(low) + high)
        keys.exact[first : first + chunk_size] = of_forms[:, 0]
        keys.orbit[first : first + chunk_size] = of_forms.min(axis=1)
    return keys


def join_keys(pieces: Sequence[GridKeys]) -> GridKeys:
    """The keys of all grids of the pieces."""
    return GridKeys(*(np.concatenate(each) for each in zip(*pieces, strict=True)))


def count_overlap(keys: GridKeys, *, known: GridKeys) -> Overlap:
    """How many of the grids with `keys` are among the `known` ones."""
    # In their own order, keys are found much faster.
    found = (find_known(np.sort(mine), theirs) for mine, theirs in zip(keys, known, strict=True))
    return Overlap(*(int(np.count_nonzero(each)) for each in found))


def count_repeats(keys: GridKeys) -> Overlap:
    """How many of the grids repeat an earlier one."""
    return Overlap(*(_count_equal_neighbours(np.sort(each)) for each in keys))


def find_known(keys: Keys, known: Keys) -> npt.NDArray[np.bool_]:
    """Which of the keys (N,) are among the known ones (M,), of which there is at least one."""
    # Sorting takes a fraction of the time of numpy's own `isin` and `unique`.
    ordered = np.sort(known)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    is_known: npt.NDArray[np.bool_] = ordered[places] == keys
    return is_known


def _count_equal_neighbours(keys: Keys) -> int:
    return int(np.count_nonzero(keys[1:] == keys[:-1]))


def _draw_weights(size: int) -> npt.NDArray[np.float64]:
    """Two numbers below 2^32 for each cell, as each symmetry moves them: (size², 16)."""
    cells = np.arange(1, size * size + 1, dtype=np.uint64)
    drawn = _mix(cells * np.uint64(_STEP))
    halves = (drawn & np.uint64(0xFFFF_FFFF), drawn >> np.uint64(32))
    moved = [half[form] for half in halves for form in list_symmetries(size)]
    return np.stack(moved, axis=1).astype(np.float64)


def _mix(values: Keys) -> Keys:
    """Spread each number over all 64 bits; different numbers stay different."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
