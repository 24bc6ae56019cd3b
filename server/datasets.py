"""Data sets that users bring: `.npz` files in the data directory, read without trust."""

import re
import zipfile
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

BUILT_IN_DATASETS: Final = ("atomic", "arc")
DATASET_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
NUM_COLOURS: Final = 10
MAX_GRID_SIZE: Final = 32
MAX_DATASET_BYTES: Final = 4 * 2**30
SPLITS: Final = ("train", "val", "test")

Grids = npt.NDArray[np.uint8]


class DatasetError(ValueError):
    """The data set cannot be used; the message says what is wrong with it."""


def check_dataset(name: str, *, datasets_dir: Path) -> None:
    """Raise DatasetError unless `name` is built in or a readable file of valid grids."""
    if name not in BUILT_IN_DATASETS:
        read_npz(name, datasets_dir=datasets_dir)


def read_npz(name: str, *, datasets_dir: Path) -> dict[str, Grids]:
    """Read `datasets_dir/name.npz`: keys `train`, `val` and `test`, or `images` alone.

    Each array is (N, S, S) uint8 with colours 0-9. Nothing is unpickled, and no array is read
    before its header has been checked. Raises DatasetError.
    """
    path = _find_npz(name, datasets_dir=datasets_dir)
    try:
        with zipfile.ZipFile(path) as archive:
            keys = _choose_keys({m.removesuffix(".npy") for m in archive.namelist()})
            arrays = {key: _read_grids(archive, key=key) for key in keys}
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise DatasetError(f"{path.name} is no readable .npz file (truncated?): {error}") from None
    except DatasetError as error:
        raise DatasetError(f"{path.name}: {error}") from None
    sizes = {key: grids.shape[1] for key, grids in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise DatasetError(f"{path.name}: all arrays need one grid size, not {sizes}")
    return arrays


def _find_npz(name: str, *, datasets_dir: Path) -> Path:
    available = sorted(path.stem for path in datasets_dir.glob("*.npz"))
    # Comparing with what the folder lists means that no name can lead out of it.
    if not re.match(DATASET_NAME_PATTERN, name) or name not in available:
        allowed = ", ".join([*BUILT_IN_DATASETS, *available])
        raise DatasetError(
            f"there is no data set {name!r}; known are {allowed}. "
            f"Put {name}.npz into the data directory's datasets/ to add it"
        )
    return datasets_dir / f"{name}.npz"


def _choose_keys(present: set[str]) -> tuple[str, ...]:
    if present >= set(SPLITS):
        return SPLITS
    if "images" in present:
        return ("images",)
    raise DatasetError(
        f"needs the keys train, val and test, or images; it has {sorted(present) or 'none'}"
    )


def _read_grids(archive: zipfile.ZipFile, *, key: str) -> Grids:
    with archive.open(f"{key}.npy") as file:
        shape, dtype = _read_header(file, key=key)
    _check_header(shape, dtype=dtype, key=key)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    if archive.getinfo(f"{key}.npy").file_size < num_bytes or num_bytes > MAX_DATASET_BYTES:
        raise DatasetError(f"{key} claims {num_bytes} bytes, which the file does not hold")
    with archive.open(f"{key}.npy") as file:
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise DatasetError(f"{key} cannot be read: {error}") from None
    if array.min() < 0 or array.max() >= NUM_COLOURS:
        raise DatasetError(
            f"{key} has values from {array.min()} to {array.max()}; colours are 0 to 9"
        )
    return np.ascontiguousarray(array, dtype=np.uint8)


def _read_header(file: IO[bytes], *, key: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DatasetError(f"{key} has no valid array header: {error}") from None
    return shape, dtype


def _check_header(shape: tuple[int, ...], *, dtype: np.dtype[np.generic], key: str) -> None:
    if dtype.hasobject:
        raise DatasetError(f"{key} is an array of Python objects; an integer dtype is needed")
    if dtype.kind not in "iu":
        raise DatasetError(f"{key} has dtype {dtype}; an integer dtype is needed")
    minimum = 10 if key == "images" else 1
    if len(shape) != 3 or shape[0] < minimum:
        raise DatasetError(f"{key} has shape {shape}; ({minimum} or more, S, S) is needed")
    if shape[1] != shape[2] or shape[1] % 4 or not 4 <= shape[1] <= MAX_GRID_SIZE:
        raise DatasetError(
            f"{key} has grids of {shape[1]}x{shape[2]}; square grids are needed, of a size "
            f"divisible by 4 and at most {MAX_GRID_SIZE}"
        )
