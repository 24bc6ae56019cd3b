"""The grids of an `.npz` or `.npy` file, read piece by piece: a file of any size, and of any
integer type, takes little memory."""

import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from server.files.npz import (
    MIN_IMAGES,
    Grids,
    Header,
    check_colours,
    check_header,
    check_num_bytes,
    check_sizes,
    open_member,
    read_data,
    read_exactly,
    read_header,
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
            yield from _read_pieces(file, header, num_rows=num_rows, key=key)

    def read(self, key: str) -> Grids:
        """A whole array."""
        return _join(self.iterate(key), shape=self._headers[key].shape)

    def check(self) -> None:
        """Read everything."""
        for key in self._headers:
            for _ in self.iterate(key):
                pass


def read_arrays(archive: zipfile.ZipFile) -> dict[str, Grids]:
    """The arrays of an archive that hold grids, (N, H, W) of colours. Raises DatasetError."""
    arrays = {}
    for key in read_headers(archive):
        with open_member(archive, key=key) as (file, header):
            arrays[key] = _read_array(file, header, key=key)
    return arrays


def read_npy(path: Path) -> Grids:
    """The array of a bare `.npy` file, (N, H, W) of colours. Raises DatasetError."""
    key = "the array"
    with path.open("rb") as file:
        header = read_header(file, key=key)
        check_header(header, key=key, minimum=MIN_IMAGES)
        check_num_bytes(header, key=key, num_bytes=path.stat().st_size - file.tell())
        return _read_array(file, header, key=key)


def _read_array(file: IO[bytes], header: Header, *, key: str) -> Grids:
    num_rows = max(1, _PIECE_CELLS // math.prod(header.shape[1:]))
    pieces = _read_pieces(file, header, num_rows=num_rows, key=key)
    return _join(pieces, shape=header.shape)


def _join(pieces: Iterable[Grids], *, shape: tuple[int, ...]) -> Grids:
    grids = np.empty(shape, dtype=np.uint8)
    start = 0
    for piece in pieces:
        grids[start : start + len(piece)] = piece
        start += len(piece)
    return grids


def _read_pieces(file: IO[bytes], header: Header, *, num_rows: int, key: str) -> Iterator[Grids]:
    """The data behind a header, by rows. Raises DatasetError if they are no colours."""
    for piece in _read_rows(file, header, num_rows=num_rows, key=key):
        check_colours(piece, key=key)
        yield np.ascontiguousarray(piece, dtype=np.uint8)


def _read_rows(
    file: IO[bytes], header: Header, *, num_rows: int, key: str
) -> Iterator[npt.NDArray[Any]]:
    """The same as it is stored."""
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
