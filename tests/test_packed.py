"""Grids of a file that are read piece by piece."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from server.files.datasets import DatasetContents, count_colours, measure_overlap
from server.files.imports import open_grids, read_file
from server.files.npz import DatasetError
from server.files.packed import have_same_grids

MIB = 2**20


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">i2", "<u4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("num_grids", [10, 1023, 1024, 1025, 3000])
def test_pieces_are_the_whole(tmp_path: Path, num_grids: int, order: str, dtype: str) -> None:
    grids = np.random.default_rng(0).integers(0, 10, size=(num_grids, 32, 32)).astype(dtype)
    path = save(tmp_path / "grids.npz", images=np.asarray(grids, order=order))  # type: ignore[call-overload]
    with open_grids(path) as packed:
        assert packed.num_grids == {"images": num_grids}
        pieces = list(packed.iterate("images"))
        assert np.array_equal(np.concatenate(pieces), grids)
        assert max(piece.size for piece in pieces) <= MIB
        assert np.array_equal(packed.read("images"), grids)


def test_contents_are_those_of_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        split: rng.integers(0, 10, size=(number, 32, 32), dtype=np.uint8)
        for split, number in (("train", 2500), ("val", 30), ("test", 1100))
    }
    arrays["val"][:3], arrays["test"][5] = arrays["train"][-3:], np.rot90(arrays["train"][1200])
    with open_grids(save(tmp_path / "grids.npz", **arrays)) as packed:
        contents = DatasetContents.of(packed)
    assert contents.colour_counts == count_colours(*arrays.values())
    assert contents.overlap == measure_overlap(arrays)
    assert contents.overlap["val"] == (3, 3)
    assert contents.overlap["test"] == (0, 1)
    places = np.linspace(0, 2499, 40).astype(int)
    assert np.array_equal(contents.sample, arrays["train"][places])


@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_value_that_is_no_colour_is_found_wherever_it_is(tmp_path: Path, place: int) -> None:
    grids = np.zeros((3000, 32, 32), dtype=np.int16)
    grids[place, 31, 31] = 10
    path = save(tmp_path / "grids.npz", images=grids)
    with pytest.raises(DatasetError, match=r"grids.npz: images has values from 0 to 10"):
        read_file(path)


def test_same_grids_are_recognised_however_they_are_packed(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).integers(0, 10, size=(2000, 32, 32))
    one = save(tmp_path / "one.npz", images=grids)
    np.savez(tmp_path / "two.npz", images=np.asfortranarray(grids.astype(np.uint8)))
    grids[-1, -1, -1] = 9 - grids[-1, -1, -1]
    three = save(tmp_path / "three.npz", images=grids)
    with open_grids(one) as new, open_grids(tmp_path / "two.npz") as old:
        assert have_same_grids(new, old)
    with open_grids(one) as new, open_grids(three) as old:
        assert not have_same_grids(new, old)


def test_large_file_takes_little_memory(tmp_path: Path) -> None:
    """Of 128 MiB of numbers, with 24 bytes kept of each grid."""
    path = save(tmp_path / "large.npz", images=np.zeros((2**14, 32, 32), dtype=np.int64))
    tracemalloc.start()
    try:
        with open_grids(path) as packed:
            packed.check()
            DatasetContents.of(packed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * MIB
