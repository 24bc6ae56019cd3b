"""Keys of grids and of their orbits, and the counts that rest on them."""

import numpy as np
import pytest

from server.files.orbits import (
    GridKeys,
    Overlap,
    compute_keys,
    count_overlap,
    count_repeats,
    find_known,
    list_symmetries,
)

SIZES = pytest.mark.parametrize("size", [4, 8, 16, 32])


def random_grids(num_grids: int, *, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 10, (num_grids, size, size), dtype=np.uint8)


def list_forms(grid: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(each, turns) for each in (grid, grid.T) for turns in range(4)]


@SIZES
def test_all_forms_of_a_grid_have_one_orbit_and_keys_of_their_own(size: int) -> None:
    for grid in random_grids(20, size=size):
        keys = compute_keys(np.stack(list_forms(grid)))
        assert len(set(keys.orbit)) == 1
        assert len(set(keys.exact)) == 8
        assert keys.orbit[0] == keys.exact.min()


@SIZES
def test_grids_that_differ_in_one_cell_have_other_keys(size: int) -> None:
    grids = np.repeat(random_grids(1, size=size), size * size, axis=0)
    cells = np.arange(size * size)
    grids.reshape(size * size, -1)[cells, cells] += 1
    keys = compute_keys(grids)
    assert len(set(keys.orbit)) == len(set(keys.exact)) == size * size


def test_grids_of_one_colour_and_of_two_cells_do_not_share_keys() -> None:
    """Sums that cancel out would show here: all pairs of cells in two colours."""
    first, second = np.triu_indices(64, 1)
    grids = np.zeros((2 * len(first) + 10, 64), dtype=np.uint8)
    places = np.arange(len(first))
    for offset, (one, other) in ((0, (1, 2)), (len(first), (2, 1))):
        grids[offset + places, first], grids[offset + places, second] = one, other
    grids[-10:] = np.arange(10)[:, None]
    keys = compute_keys(grids.reshape(-1, 8, 8))
    assert len(set(keys.exact)) == len(grids)


def test_keys_are_those_of_every_version() -> None:
    """The split of a generated grid follows from its key, also in later versions."""
    ramp = (np.arange(256, dtype=np.uint16) % 10).astype(np.uint8).reshape(1, 16, 16)
    keys = compute_keys(np.concatenate([np.zeros_like(ramp), ramp]))
    assert [hex(key) for key in keys.exact] == ["0x0", "0xd19cc7f14f9b33d5"]
    assert [hex(key) for key in keys.orbit] == ["0x0", "0x10baf693f573f70d"]


def test_parts_of_the_keys_are_evenly_taken() -> None:
    keys = compute_keys(random_grids(20_000, size=8))
    for each in keys:
        counts = np.bincount((each % np.uint64(10)).astype(np.int64))
        assert counts == pytest.approx(2000, abs=5 * 42)


def test_overlap_counts_grids_and_not_pairs() -> None:
    known = random_grids(3000, size=4)
    new = random_grids(50, size=4, seed=1)
    grids = np.concatenate([new, known[[7, 7, 8]], np.rot90(known[[2999, 5]], axes=(1, 2))])
    overlap = count_overlap(compute_keys(grids), known=compute_keys(known))
    assert overlap == Overlap(exact=3, by_orbit=5)


def test_repeats_are_grids_that_another_one_before_them_equals() -> None:
    grids = random_grids(100)
    assert count_repeats(compute_keys(grids)) == Overlap(exact=0, by_orbit=0)
    again = np.concatenate([grids, grids[:2], grids[:1], grids[5].T[None], grids[6][::-1][None]])
    assert count_repeats(compute_keys(again)) == Overlap(exact=3, by_orbit=5)


def test_known_keys_are_found_wherever_they_stand() -> None:
    keys = np.array([5, 0, 2**64 - 1, 7, 5], dtype=np.uint64)
    known = np.array([9, 5, 0, 5], dtype=np.uint64)
    assert find_known(keys, known).tolist() == [True, True, False, False, True]


def test_no_grid_has_no_key() -> None:
    keys = compute_keys(np.zeros((0, 8, 8), dtype=np.uint8))
    assert keys.exact.size == keys.orbit.size == 0
    known = GridKeys(*(np.ones(1, dtype=np.uint64) for _ in range(2)))
    assert count_overlap(keys, known=known) == Overlap(exact=0, by_orbit=0)


def test_first_symmetry_changes_nothing() -> None:
    assert list_symmetries(4)[0].tolist() == list(range(16))
