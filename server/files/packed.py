"""The grids of an `.npz` file, read piece by piece: a file of any size takes little memory."""

import zipfile
from collections.abc import Iterator
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from server.files.npz import (
    Grids,
    Header,
    check_colours,
    check_sizes,
    open_member,
    read_data,
    read_exactly,
    read_headers,
)

#: Cells of one piece.
_PIECE_CELLS: Final = 2**20


class PackedGrids:
    """The arrays of grids in an archive, (N, S, S) each, whose headers have been checked.

    Raises DatasetError, also while pieces are read, and what is in `BROKEN_ARCHIVE`.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._headers = read_headers(archive)
        check_sizes({key: header.shape for key, header in self._headers.items()})

    @property
    def num_grids(self) -> dict[str, int]:
        """By the keys of the arrays."""
        return {key: header.shape[0] for key, header in self._headers.items()}

    @property
    def grid_size(self) -> int:
        return next(iter(self._headers.values())).shape[1]

    def iterate(self, key: str) -> Iterator[Grids]:
        """The grids of an array in their order, some at a time."""
        header, num_rows = self._headers[key], max(1, _PIECE_CELLS // self.grid_size**2)
        with open_member(self._archive, key=key) as (file, _):
            for piece in _read_pieces(file, header, num_rows=num_rows, key=key):
                check_colours(piece, key=key)
                yield np.ascontiguousarray(piece, dtype=np.uint8)

    def read(self, key: str) -> Grids:
        """A whole array."""
        grids = np.empty(self._headers[key].shape, dtype=np.uint8)
        start = 0
        for piece in self.iterate(key):
            grids[start : start + len(piece)] = piece
            start += len(piece)
        return grids

    def check(self) -> None:
        """Read everything."""
        for key in self._headers:
            for _ in self.iterate(key):
                pass


def _read_pieces(
    file: IO[bytes], header: Header, *, num_rows: int, key: str
) -> Iterator[npt.NDArray[Any]]:
    """The data behind a header, by rows."""
    num_grids, *shape = header.shape
    sizes = [min(num_rows, num_grids - start) for start in range(0, num_grids, num_rows)]
    if header.is_fortran:  # stored by columns, so that it can only be read as a whole
        whole = read_data(file, header, key=key)
        yield from np.split(whole, np.cumsum(sizes)[:-1])
        return
    for size in sizes:
        content = read_exactly(file, size * header.num_bytes // num_grids)
        yield np.frombuffer(content, dtype=header.dtype).reshape(size, *shape)


def have_same_grids(one: PackedGrids, other: PackedGrids) -> bool:
    """Whether both have the same arrays, however they are packed."""
    if (one.num_grids, one.grid_size) != (other.num_grids, other.grid_size):
        return False
    return all(
        np.array_equal(mine, theirs)
        for key in one.num_grids
        for mine, theirs in zip(one.iterate(key), other.iterate(key), strict=True)
    )
