"""The generated corpus."""

import numpy as np
import pytest

from worker.atomic import GRID_SIZE, _grow_blobs, _shape_bank, generate_atomic


@pytest.fixture(scope="module")
def corpus() -> np.ndarray:
    return generate_atomic(num_grids=100_000, seed=42)


def test_corpus_has_the_colour_shares_of_the_design(corpus: np.ndarray) -> None:
    shares = np.bincount(corpus.reshape(-1), minlength=10) / corpus.size
    assert 0.930 <= shares[0] <= 0.933
    assert shares[1:].min() >= 0.0074
    assert shares[1:].max() <= 0.0078
    assert 119 <= shares[0] / shares[1:].min() <= 128


def test_every_grid_has_one_to_four_objects_colours(corpus: np.ndarray) -> None:
    num_colours = [len(set(grid[grid > 0])) for grid in corpus[:2000].reshape(2000, -1)]
    assert set(num_colours) == {1, 2, 3, 4}
    assert corpus.dtype == np.uint8
    assert corpus.shape == (100_000, GRID_SIZE, GRID_SIZE)


def test_the_same_seed_gives_the_same_grids_and_another_seed_others() -> None:
    first = generate_atomic(num_grids=500, seed=1)
    assert np.array_equal(first, generate_atomic(num_grids=500, seed=1))
    assert not np.array_equal(first, generate_atomic(num_grids=500, seed=2))


def test_blobs_have_2_to_15_cells_joined_over_the_8_neighbourhood() -> None:
    shapes = _grow_blobs(500, rng=np.random.default_rng(0))
    sizes = set()
    for rows, cols in zip(shapes.rows, shapes.cols, strict=True):
        cells = {(int(r), int(c)) for r, c in zip(rows, cols, strict=True)}
        sizes.add(len(cells))
        reached, frontier = set(), {next(iter(cells))}
        while frontier:
            reached |= frontier
            frontier = {
                (r + i, c + j) for r, c in frontier for i in (-1, 0, 1) for j in (-1, 0, 1)
            } & (cells - reached)
        assert reached == cells
    assert sizes == set(range(2, 16))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("rectangle", range(2, 16)), ("line", range(2, 9)), ("pattern", range(2, 14))],
)
def test_shapes_that_are_not_grown_keep_their_sizes(kind: str, sizes: range) -> None:
    shapes, probabilities = _shape_bank(kind)
    for rows, cols in zip(shapes.rows, shapes.cols, strict=True):
        assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) in sizes
        assert rows.min() == cols.min() == 0
    assert probabilities.sum() == pytest.approx(1)
