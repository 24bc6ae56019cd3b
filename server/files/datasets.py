"""Uploaded data sets: `.npz` files in the data directory, read as untrusted input."""

import filecmp
import io
import lzma
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Final, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.errors import ConflictError, InvalidInputError
from server.files.filesystem import add_file, make_readable, sync_file
from server.files.hashes import FileVersion, find_sha256, read_version
from server.files.orbits import Overlap, compute_keys, count_overlap, count_repeats
from server.models.configuration import NUM_COLOURS, BuiltInDataset
from server.models.options import NAME_PATTERN

MAX_GRID_SIZE: Final = 32
MAX_DATASET_BYTES: Final = 4 * 2**30
#: The maximum unpacked size of an upload.
MAX_UNPACKED_BYTES: Final = 2**30
NUM_SAMPLE_GRIDS: Final = 40
SPLITS: Final = ("train", "val", "test")
#: Of uploads that are not complete.
UPLOAD_SUFFIX: Final = ".part"
#: The colours of the ARC editor, from background to brown.
PALETTE: Final = np.array(
    [
        (0x00, 0x00, 0x00), (0x1E, 0x93, 0xFF), (0xF9, 0x3C, 0x31), (0x4F, 0xCC, 0x30),
        (0xFF, 0xDC, 0x00), (0x99, 0x99, 0x99), (0xE5, 0x3A, 0xA3), (0xFF, 0x85, 0x1B),
        (0x87, 0xD8, 0xF1), (0x92, 0x12, 0x31),
    ],
    dtype=np.uint8,
)  # fmt: skip

_PREVIEW_COLUMNS, _PREVIEW_SCALE, _PREVIEW_GAP = 8, 4, 1
_PAPER: Final = 0xFF

#: Errors of zipfile and its decompressors. An encrypted member raises RuntimeError, an unknown
#: compression method NotImplementedError (a RuntimeError), an undecodable name ValueError.
_BROKEN_ARCHIVE: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
#: numpy evaluates the header as a Python literal; invalid literals raise any of these errors.
_BROKEN_HEADER: Final = (
    ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError,
)  # fmt: skip

Grids = npt.NDArray[np.uint8]


class DatasetError(InvalidInputError):
    """The data set cannot be used; the message says why."""

    field = "dataset"


class DatasetExistsError(ConflictError):
    """Another data set has the name. Jobs depend on their data, so a data set is never replaced."""


def count_colours(*splits: Grids) -> list[int]:
    """The number of cells of each colour."""
    # Ten passes over bytes take a tenth of the time of one `bincount`, which converts each byte to
    # eight.
    return [
        sum(int(np.count_nonzero(grids == colour)) for grids in splits)
        for colour in range(NUM_COLOURS)
    ]


def check_dataset(name: str, *, datasets_dir: Path) -> str | None:
    """The SHA-256 of an uploaded data set's file; None for a built-in one.

    Raises DatasetError unless `name` is built in or a valid file.
    """
    if name in set(BuiltInDataset):
        return None
    path = find_npz(name, datasets_dir=datasets_dir)
    _read_contents(path, read_version(path))
    return find_sha256(path)


def read_npz(name: str, *, datasets_dir: Path) -> dict[str, Grids]:
    """Read `datasets_dir/name.npz`. Raises DatasetError."""
    return read_file(find_npz(name, datasets_dir=datasets_dir))


def list_npz(datasets_dir: Path) -> list[Path]:
    """The files of the uploaded data sets, sorted by name."""
    found = (path for path in datasets_dir.glob("*.npz") if not path.is_symlink())
    named = (path for path in found if re.fullmatch(NAME_PATTERN, path.stem))
    return sorted((path for path in named if path.is_file()), key=lambda path: path.stem)


@contextmanager
def open_upload(datasets_dir: Path) -> Iterator[IO[bytes]]:
    """A temporary file for an upload, to be passed to `admit_upload`."""
    datasets_dir.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(
        dir=datasets_dir, prefix=".", suffix=UPLOAD_SUFFIX, delete=False
    ) as file:
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


def admit_upload(file: IO[bytes], *, name: str, datasets_dir: Path) -> bool:
    """Store a valid upload as `name.npz`; returns False if the same file is already stored.

    Raises DatasetError, and DatasetExistsError if another data set has the name.
    """
    file.flush()
    upload_path, path = Path(file.name), datasets_dir / f"{name}.npz"
    sync_file(upload_path, file.fileno())
    read_file(upload_path, shown_name=path.name, max_bytes=MAX_UNPACKED_BYTES)
    make_readable(upload_path)
    try:
        add_file(upload_path, path)
    except FileExistsError:
        if path.is_file() and filecmp.cmp(upload_path, path, shallow=False):
            return False
        message = f"there is another data set {name!r}; delete it first, or use another name"
        raise DatasetExistsError(message) from None
    return True


@dataclass(frozen=True, slots=True)
class DatasetContents:
    """The contents of a data set, over all splits."""

    num_grids: dict[str, int]  #: by split; `images` is split by the job that uses it
    grid_size: int
    colour_counts: list[int]  #: cells of each colour
    #: Of `val` and `test` the grids that also occur in `train`; of `images` those that repeat an
    #: earlier one, since a job may put one into training and the other one into another split.
    overlap: dict[str, Overlap]
    sample: Grids  #: the first grids, (N, S, S)

    @classmethod
    def of(cls, arrays: dict[str, Grids]) -> Self:
        first = next(iter(arrays.values()))
        num_grids = {key: len(grids) for key, grids in arrays.items()}
        counts = count_colours(*arrays.values())
        sample = first[:NUM_SAMPLE_GRIDS].copy()
        return cls(num_grids, first.shape[1], counts, measure_overlap(arrays), sample)


def measure_overlap(arrays: Mapping[str, Grids]) -> dict[str, Overlap]:
    """The grids of each split but training that also occur there; of `images` alone, those that
    repeat an earlier one."""
    keys = {key: compute_keys(grids) for key, grids in arrays.items()}
    if "images" in keys:
        return {"images": count_repeats(keys["images"])}
    known = keys.pop("train")
    return {split: count_overlap(each, known=known) for split, each in keys.items()}


def read_contents(name: str, *, datasets_dir: Path) -> DatasetContents:
    """The contents of an uploaded data set. Raises DatasetError."""
    path = find_npz(name, datasets_dir=datasets_dir)
    return _read_contents(path, read_version(path))


def read_file(
    path: Path, *, shown_name: str = "", max_bytes: int = MAX_DATASET_BYTES
) -> dict[str, Grids]:
    """Read an `.npz` file: keys `train`, `val` and `test`, or `images` alone.

    Each array is (N, S, S) uint8 with colours 0-9. Nothing is unpickled. The sizes in the archive's
    directory are checked before anything is read, and each array's header before the array.
    Raises DatasetError.
    """
    name = shown_name or path.name
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, max_bytes=max_bytes)
            members = (name for name in archive.namelist() if name.endswith(".npy"))
            keys = _choose_keys({member.removesuffix(".npy") for member in members})
            arrays = {key: _read_grids(archive, key=key) for key in keys}
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from None
    except _BROKEN_ARCHIVE as error:
        if not isinstance(error, OSError) and _is_npy(path):
            raise DatasetError(
                f"{name} is a single array (.npy); numpy.savez(file, images=array) makes an .npz"
            ) from None
        raise DatasetError(f"{name} is no readable .npz file (truncated?): {error}") from None
    sizes = {key: grids.shape[1] for key, grids in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise DatasetError(f"{name}: all arrays need one grid size, not {sizes}")
    return arrays


def find_npz(name: str, *, datasets_dir: Path) -> Path:
    """The file of an uploaded data set. Raises DatasetError if there is none."""
    available = {path.stem: path for path in list_npz(datasets_dir)}
    # The name is compared with the folder's listing, so no name can lead out of the folder.
    if name not in available:
        allowed = ", ".join([*BuiltInDataset, *available])
        raise DatasetError(
            f"there is no data set {name!r}; known are {allowed}. "
            f"PUT /datasets/{name[:64]} or a file datasets/{name[:64]}.npz adds it"
        )
    return available[name]


@lru_cache(maxsize=128)
def _read_contents(path: Path, _version: FileVersion) -> DatasetContents:
    """Cached, so that an unchanged file is read only once."""
    return DatasetContents.of(read_file(path))


def _is_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX


def _check_sizes(archive: zipfile.ZipFile, *, max_bytes: int) -> None:
    # zipfile never unpacks more of a member than this size, whatever the compressed data holds.
    claimed = sum(member.file_size for member in archive.infolist())
    if claimed > max_bytes:
        raise DatasetError(f"unpacks to {claimed} bytes; {max_bytes} are allowed")


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
    num_bytes = math.prod(shape) * dtype.itemsize
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
    except _BROKEN_HEADER as error:
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


def draw_preview(contents: DatasetContents) -> bytes:
    """A PNG of up to 40 grids, eight per row."""
    cell = contents.grid_size * _PREVIEW_SCALE + _PREVIEW_GAP
    num_rows = -(-len(contents.sample) // _PREVIEW_COLUMNS)
    shape = (num_rows * cell + _PREVIEW_GAP, _PREVIEW_COLUMNS * cell + _PREVIEW_GAP, 3)
    image = np.full(shape, _PAPER, dtype=np.uint8)
    for index, grid in enumerate(contents.sample):
        top, left = (i * cell + _PREVIEW_GAP for i in divmod(index, _PREVIEW_COLUMNS))
        drawn = PALETTE[grid].repeat(_PREVIEW_SCALE, axis=0).repeat(_PREVIEW_SCALE, axis=1)
        image[top : top + len(drawn), left : left + len(drawn)] = drawn
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
