"""The `atomic` corpus: small coloured objects on a black 16x16 grid, generated in bulk.

Every grid is drawn in the same way: one to four objects that never overlap but may touch, each in
one colour. All grids are built at once with numpy, so 100,000 of them take about a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
import numpy.typing as npt

from server.files.orbits import compute_keys

GRID_SIZE = 16
MAX_CELLS = 15

#: Of ten orbits eight are training's, one is validation's and one is the test split's.
_NUM_PARTS = 10
_SPLIT_OF_PART = np.array([0] * 8 + [1, 2])

_KIND_PROBABILITIES = {"blob": 0.4, "rectangle": 0.2, "line": 0.2, "pattern": 0.2}
_MAX_PLACEMENT_TRIES = 50
_NEIGHBOURS = np.array(
    [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)], dtype=np.int16
)
# A blob starts at the centre and stays within 7 cells of it, so that it fits any grid.
_CANVAS_SIZE = GRID_SIZE + 1

_Cells = list[tuple[int, int]]
_Int16 = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Objects before they are placed: `rows` and `cols` are (num_shapes, MAX_CELLS) offsets
    from the top left corner; a shape with fewer cells repeats its first one."""

    rows: _Int16
    cols: _Int16

    def __getitem__(self, index: npt.NDArray[np.intp]) -> "_Shapes":
        return _Shapes(self.rows[index], self.cols[index])


def generate_splits(*, sizes: Sequence[int], seed: int) -> list[npt.NDArray[np.uint8]]:
    """Generate a training, a validation and a test split of these sizes, in random order.

    A grid's split follows from its orbit alone, so that none has a grid of another one under any
    symmetry, also not one that another seed has generated. Grids are generated until each split
    has enough.
    """
    found: list[list[npt.NDArray[np.uint8]]] = [[], [], []]
    missing = np.array(sizes)
    numbers = count(1)  # not from 0: numpy's random numbers of `seed` and `[seed, 0]` are the same
    while missing.any():
        grids = generate_atomic(num_grids=_count_enough(missing), seed=(seed, next(numbers)))
        parts = compute_keys(grids).orbit % np.uint64(_NUM_PARTS)
        splits = _SPLIT_OF_PART[parts.astype(np.int64)]
        for split in range(len(found)):
            found[split].append(grids[splits == split][: missing[split]])
            missing[split] -= len(found[split][-1])
    return [np.concatenate(grids) for grids in found]


def _count_enough(missing: npt.NDArray[np.int64]) -> int:
    """Grids of which probably so many fall to each split."""
    shares = np.bincount(_SPLIT_OF_PART) / _NUM_PARTS
    return 100 + int(1.04 * (missing / shares).max())


def generate_atomic(*, num_grids: int, seed: int | Sequence[int]) -> npt.NDArray[np.uint8]:
    """Generate `(num_grids, 16, 16)` uint8 grids; the same seed gives the same grids."""
    rng = np.random.default_rng(seed)
    grids = np.zeros((num_grids, GRID_SIZE * GRID_SIZE), dtype=np.uint8)
    num_objects = rng.integers(1, 5, size=num_grids)
    for slot in range(4):
        targets = np.flatnonzero(num_objects > slot)
        shapes = _draw_shapes(targets.size, rng=rng)
        colours = rng.integers(1, 10, size=targets.size, dtype=np.uint8)
        _place(grids, targets=targets, shapes=shapes, colours=colours, rng=rng)
    return grids.reshape(num_grids, GRID_SIZE, GRID_SIZE)


def _draw_shapes(num_shapes: int, *, rng: np.random.Generator) -> _Shapes:
    drawn = _Shapes(*(np.zeros((num_shapes, MAX_CELLS), dtype=np.int16) for _ in range(2)))
    kinds = rng.choice(4, size=num_shapes, p=list(_KIND_PROBABILITIES.values()))
    for kind, name in enumerate(_KIND_PROBABILITIES):
        members = np.flatnonzero(kinds == kind)
        if name == "blob":
            shapes = _grow_blobs(members.size, rng=rng)
        else:
            bank, probabilities = _shape_bank(name)
            shapes = bank[rng.choice(probabilities.size, size=members.size, p=probabilities)]
        drawn.rows[members], drawn.cols[members] = shapes.rows, shapes.cols
    return drawn


def _grow_blobs(num_blobs: int, *, rng: np.random.Generator) -> _Shapes:
    """Grow blobs of 2-15 cells over the 8-neighbourhood.

    A random cell of the blob proposes a random neighbour and taken ones are rejected, so that
    a free cell's chance is proportional to the number of its neighbours in the blob.
    """
    num_cells = rng.integers(2, MAX_CELLS + 1, size=num_blobs)
    taken = np.ones((num_blobs, _CANVAS_SIZE, _CANVAS_SIZE), dtype=bool)
    taken[:, 1:-1, 1:-1] = False
    cells = np.full((num_blobs, MAX_CELLS, 2), _CANVAS_SIZE // 2, dtype=np.int16)
    taken[:, _CANVAS_SIZE // 2, _CANVAS_SIZE // 2] = True
    for size in range(1, MAX_CELLS):
        pending = np.flatnonzero(num_cells > size)
        while pending.size:
            parents = cells[pending, rng.integers(0, size, size=pending.size)]
            proposed = parents + _NEIGHBOURS[rng.integers(0, 8, size=pending.size)]
            free = ~taken[pending, proposed[:, 0], proposed[:, 1]]
            grown, spot = pending[free], proposed[free]
            cells[grown, size] = spot
            taken[grown, spot[:, 0], spot[:, 1]] = True
            pending = pending[~free]
    unused = np.arange(MAX_CELLS) >= num_cells[:, None]
    cells = np.where(unused[:, :, None], cells[:, :1], cells)
    cells -= cells.min(axis=1, keepdims=True)
    return _Shapes(cells[:, :, 0], cells[:, :, 1])


def _place(
    grids: npt.NDArray[np.uint8],
    *,
    targets: npt.NDArray[np.intp],
    shapes: _Shapes,
    colours: npt.NDArray[np.uint8],
    rng: np.random.Generator,
) -> None:
    """Paint each shape at a random free position; one that finds none is left out."""
    flat = grids.reshape(-1)
    room_down = GRID_SIZE - shapes.rows.max(axis=1)
    room_right = GRID_SIZE - shapes.cols.max(axis=1)
    cells = (
        shapes.rows.astype(np.int64) * GRID_SIZE + shapes.cols + targets[:, None] * grids.shape[1]
    )
    pending = np.arange(targets.size)
    for _ in range(_MAX_PLACEMENT_TRIES):
        top = rng.integers(0, room_down[pending])
        left = rng.integers(0, room_right[pending])
        spots = cells[pending] + (top * GRID_SIZE + left)[:, None]
        free = ~flat[spots].any(axis=1)
        flat[spots[free]] = colours[pending[free], None]
        pending = pending[~free]
        if not pending.size:
            return


@cache
def _shape_bank(kind: str) -> tuple[_Shapes, npt.NDArray[np.float64]]:
    """All shapes of a kind that is not grown, and the probability of each."""
    families = {"rectangle": [_rectangles()], "line": _lines(), "pattern": _patterns()}[kind]
    shapes = [shape for family in families for shape in family]
    probabilities = [1 / len(families) / len(family) for family in families for _ in family]
    padded = [shape + shape[:1] * (MAX_CELLS - len(shape)) for shape in shapes]
    cells = np.array(padded, dtype=np.int16)
    cells -= cells.min(axis=1, keepdims=True)
    return _Shapes(cells[:, :, 0], cells[:, :, 1]), np.array(probabilities)


def _rectangles() -> list[_Cells]:
    sides = [(h, w) for h in range(1, 6) for w in range(1, 6) if 2 <= h * w <= MAX_CELLS]
    return [[(r, c) for r in range(h) for c in range(w)] for h, w in sides]


def _lines() -> list[list[_Cells]]:
    directions = [(0, 1), (1, 0), (1, 1), (1, -1)]
    return [[[(i * r, i * c) for i in range(n)] for r, c in directions] for n in range(2, 9)]


def _patterns() -> list[list[_Cells]]:
    """Checkerboards of 2-3 cells a side, L with arms of 2-4 cells, T and plus with arms of
    2-3, zigzags of 3-7 cells. The arms of an L or a T share the cell in which they meet; those
    of a plus stand around its centre."""
    checkerboards = [
        [(r, c) for r in range(h) for c in range(w) if (r + c) % 2 == 0]
        for h in (2, 3)
        for w in (2, 3)
    ]
    ells = [
        [(i, 0) for i in range(down)] + [(0, j) for j in range(1, right)]
        for down in range(2, 5)
        for right in range(2, 5)
    ]
    tees = [
        [(0, j) for j in range(1 - arm, arm)] + [(i, 0) for i in range(1, arm)] for arm in (2, 3)
    ]
    pluses = [
        [(0, 0)]
        + [(s * i, 0) for s in (1, -1) for i in range(1, arm + 1)]
        + [(0, s * i) for s in (1, -1) for i in range(1, arm + 1)]
        for arm in (2, 3)
    ]
    zigzags = [[(i % 2, i) for i in range(n)] for n in range(3, 8)]
    return [_turned(family) for family in (checkerboards, ells, tees, pluses, zigzags)]


def _turned(shapes: list[_Cells]) -> list[_Cells]:
    """Each shape in its four orientations."""
    turned = []
    for cells in shapes:
        for _ in range(4):
            turned.append(cells)
            cells = [(c, -r) for r, c in cells]
    return turned
