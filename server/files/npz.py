"""An `.npz` file of grids: read strictly, as untrusted input, and written so that all can read it.

Nothing is unpickled. All sizes are checked before what they are of is read.
"""

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from server.errors import InvalidInputError
from server.models.configuration import NUM_COLOURS
from server.texts import list_some

MAX_GRID_SIZE: Final = 32
MAX_DATASET_BYTES: Final = 4 * 2**30
#: The maximum unpacked size of an upload.
MAX_UNPACKED_BYTES: Final = 2**30
SPLITS: Final = ("train", "val", "test")
MIN_IMAGES: Final = 10

ZIP_MARK: Final = b"PK\x03\x04"
#: A directory of this size has about a hundred thousand files.
_MAX_DIRECTORY_BYTES: Final = 2**23
#: The end of an archive: signature, 8 bytes about its parts, the size and the offset of its
#: directory, the length of its comment. A larger archive has another end before it, found by a
#: locator: signature, number of the part, offset, number of parts.
_END, _END_MARK = struct.Struct("<4s8x2IH"), b"PK\x05\x06"
_END64, _END64_MARK = struct.Struct("<4s36x2Q"), b"PK\x06\x06"
_LOCATOR, _LOCATOR_MARK = struct.Struct("<4s4xQ4x"), b"PK\x06\x07"
_MAX_COMMENT_BYTES: Final = 2**16
#: How long an array's header is, by the version of the format; later ones are as version 2.
_LENGTHS: Final = {(1, 0): struct.Struct("<H"), (2, 0): struct.Struct("<I")}
#: As numpy has it.
_MAX_HEADER_BYTES: Final = 10_000

#: Errors of zipfile and its decompressors. An encrypted member raises RuntimeError, an unknown
#: compression method NotImplementedError (a RuntimeError), an undecodable name ValueError.
BROKEN_ARCHIVE: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
#: numpy evaluates the header as a Python literal; invalid literals raise any of these errors.
_BROKEN_HEADER: Final = (
    EOFError, ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError,
)  # fmt: skip
#: What other programs call the arrays.
_USUAL_NAMES: Final[dict[str, frozenset[str]]] = {
    "train": frozenset({"train", "x_train", "train_x", "trn", "training", "train_images"}),
    "val": frozenset({"val", "x_val", "val_x", "valid", "validation", "x_valid", "val_images"}),
    "test": frozenset({"test", "x_test", "test_x", "tst", "testing", "test_images"}),
}
_MAX_KEYS_SHOWN, _MAX_KEY_SHOWN = 20, 40
_MAX_DIMENSIONS_SHOWN: Final = 8
_DATE: Final = (1980, 1, 1, 0, 0, 0)

Grids = npt.NDArray[np.uint8]
#: Arrays of any integer type and shape, by their keys.
Arrays = Mapping[str, npt.NDArray[Any]]


class DatasetError(InvalidInputError):
    """The data set cannot be used; the message says why."""

    field = "dataset"


@dataclass(frozen=True, slots=True)
class Header:
    """What an array says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_archive(path: Path, *, max_bytes: int) -> zipfile.ZipFile:
    """An archive that nothing stands before or behind, in which each name stands once, and which
    unpacks to at most `max_bytes`. Raises DatasetError and what is in `BROKEN_ARCHIVE`."""
    with path.open("rb") as file:
        _check_ends(file)
    archive = zipfile.ZipFile(path)
    name, number = max(Counter(archive.namelist()).items(), key=itemgetter(1), default=("", 0))
    if number > 1:
        raise DatasetError(f"holds {name!r} twice, and programs differ in which they read")
    # zipfile never unpacks more of a member than this size, whatever the compressed data holds.
    claimed = sum(member.file_size for member in archive.infolist())
    if claimed > max_bytes:
        raise DatasetError(f"unpacks to {claimed} bytes; {max_bytes} are allowed")
    return archive


def read_headers(archive: zipfile.ZipFile) -> dict[str, Header]:
    """The headers of the arrays of an archive that hold grids: `train`, `val` and `test`, or
    `images` alone. Raises DatasetError."""
    headers = {}
    for key in _choose_keys(archive):
        with open_member(archive, key=key) as (_, header):
            headers[key] = header
    return headers


@contextmanager
def open_member(archive: zipfile.ZipFile, *, key: str) -> Iterator[tuple[IO[bytes], Header]]:
    """A file whose header was read and checked, at the array's data. Raises DatasetError."""
    member = archive.getinfo(f"{key}.npy")
    with archive.open(member) as file:
        header = read_header(file, key=key)
        check_header(header, key=key, minimum=MIN_IMAGES if key == "images" else 1)
        check_num_bytes(header, key=key, num_bytes=member.file_size)
        yield file, header


def write_npz(file: IO[bytes], arrays: Mapping[str, Grids]) -> None:
    """Write an `.npz` file: the same bytes for the same arrays, whenever it is written."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, grids in arrays.items():
            member = zipfile.ZipInfo(f"{key}.npy", _DATE)
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as target:
                np.lib.format.write_array(target, grids, allow_pickle=False)


def read_header(file: IO[bytes], *, key: str) -> Header:
    """The header of an array, whose data then follow. Raises DatasetError."""
    try:
        version = np.lib.format.read_magic(file)
        length = _LENGTHS.get(version, _LENGTHS[2, 0])
        # numpy would read a header of any length before it looks at the length.
        (num_bytes,) = length.unpack(prefix := read_exactly(file, length.size))
        if num_bytes > _MAX_HEADER_BYTES:
            raise DatasetError(
                f"{key} claims a header of {num_bytes} bytes; {_MAX_HEADER_BYTES} are allowed"
            )
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(io.BytesIO(prefix + read_exactly(file, num_bytes)))
    except DatasetError:
        raise
    except _BROKEN_HEADER as error:
        raise DatasetError(f"{key} has no valid array header: {error}") from None
    return Header(shape, dtype, is_fortran)


def check_header(header: Header, *, key: str, minimum: int) -> None:
    """Raises DatasetError unless it is of at least `minimum` grids of whole numbers."""
    shape, dtype = header.shape, header.dtype
    if dtype.hasobject:
        raise DatasetError(
            f"{key} is an array of Python objects; an integer dtype is needed. Grids of several "
            "sizes are padded to one size first, as with numpy.pad, or sent as ARC JSON"
        )
    if len(shape) != 3 or shape[0] < minimum or min(shape) < 1:
        shown = str(shape) if len(shape) <= _MAX_DIMENSIONS_SHOWN else f"of {len(shape)} dimensions"
        raise DatasetError(
            f"{key} has shape {shown}; ({minimum} or more, S, S) is needed"
            f"{_suggest_shape(shape, minimum=minimum)}"
        )
    if dtype.kind not in "iu":
        cast = f"; {key}.astype('uint8') converts whole numbers" if dtype.kind in "bf" else ""
        raise DatasetError(f"{key} has dtype {dtype}; an integer dtype is needed{cast}")


def check_grids(arrays: Arrays) -> dict[str, Grids]:
    """The arrays as grids of one size with colours 0 to 9. Raises DatasetError."""
    check_sizes({key: array.shape for key, array in arrays.items()})
    for key, array in arrays.items():
        check_colours(array, key=key)
    return {key: np.ascontiguousarray(array, dtype=np.uint8) for key, array in arrays.items()}


def check_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises DatasetError unless all grids have one size that is allowed."""
    for key, shape in shapes.items():
        _check_size(shape, key=key)
    sizes = {key: shape[1] for key, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        raise DatasetError(f"all arrays need one grid size, not {sizes}{_suggest_pad(sizes)}")


def check_colours(array: npt.NDArray[Any], *, key: str) -> None:
    """Raises DatasetError if there are values that are no colours."""
    if array.min() < 0 or array.max() >= NUM_COLOURS:
        raise DatasetError(
            f"{key} has values from {array.min()} to {array.max()}; colours are 0 to 9"
        )


def _suggest_pad(sizes: Mapping[str, int]) -> str:
    size = max(sizes.values())
    return f"; --pad {size} (or ?pad={size}) fills them up with background"


# -- the archive


def _check_ends(file: IO[bytes]) -> None:
    """Raises DatasetError if something stands before or behind the archive, or if its list of
    files is too long to be read."""
    size = file.seek(0, 2)
    start, comment_length = _find_end(file, size=size)
    file.seek(start)
    _, directory_size, offset, _ = _END.unpack(file.read(_END.size))
    directory_end = start
    if end64 := _read_end64(file, start=start):
        directory_end, directory_size, offset = end64
    if directory_size > _MAX_DIRECTORY_BYTES:
        raise DatasetError("holds too many files")
    if start + _END.size + comment_length != size or offset + directory_size != directory_end:
        raise DatasetError(
            "has other bytes before or behind the archive, which other programs cannot read; "
            "send the bare file"
        )


def _find_end(file: IO[bytes], *, size: int) -> tuple[int, int]:
    """Where the end of the archive begins, and the length of the comment behind it."""
    first = max(0, size - _END.size - _MAX_COMMENT_BYTES)
    file.seek(first)
    tail = file.read()
    place = tail.rfind(_END_MARK, 0, max(0, len(tail) - _END.size + len(_END_MARK)))
    if place < 0:
        raise zipfile.BadZipFile("the end of the archive is missing")
    *_, comment_length = _END.unpack_from(tail, place)
    return first + place, comment_length


def _read_end64(file: IO[bytes], *, start: int) -> tuple[int, int, int] | None:
    """Where the directory of a large archive ends, its size and its offset; None for others."""
    if start < _LOCATOR.size:
        return None
    file.seek(start - _LOCATOR.size)
    mark, end = _LOCATOR.unpack(read_exactly(file, _LOCATOR.size))
    if mark != _LOCATOR_MARK:
        return None
    file.seek(min(end, start))
    mark, directory_size, offset = _END64.unpack(read_exactly(file, _END64.size))
    if mark != _END64_MARK:
        raise zipfile.BadZipFile("the end of the archive is invalid")
    return end, directory_size, offset


def read_exactly(file: IO[bytes], num_bytes: int) -> bytes:
    """Raises EOFError if there are fewer."""
    content = file.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError("the archive is incomplete")
    return content


def is_hidden(name: str) -> bool:
    """Whether a member is hidden, or one that macOS adds."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


# -- the arrays


def _choose_keys(archive: zipfile.ZipFile) -> tuple[str, ...]:
    files = [name for name in archive.namelist() if not name.endswith("/") and not is_hidden(name)]
    members = [name for name in files if name.endswith(".npy")]
    present = {member.removesuffix(".npy") for member in members}
    if present >= set(SPLITS):
        return SPLITS
    if "images" in present:
        return ("images",)
    if not present and files:
        raise DatasetError(
            f"holds no array, only {list_some((f[-_MAX_KEY_SHOWN:] for f in files), limit=3)}; an "
            ".npz has the arrays train, val and test, or images"
        )
    shown = [key for key in sorted(present) if len(key) <= _MAX_KEY_SHOWN][:_MAX_KEYS_SHOWN]
    raise DatasetError(
        f"needs the keys train, val and test, or images; it has {shown or 'none'}"
        f"{_suggest_keys(shown)}"
    )


def _suggest_keys(present: list[str]) -> str:
    """The line of Python that gives the arrays the right names, if it is clear which they are."""
    known = {
        split: next((key for key in present if _strip_folder(key) in names), None)
        for split, names in _USUAL_NAMES.items()
    }
    found = [key for key in known.values() if key is not None]
    if len(found) == len(SPLITS):
        given = ", ".join(f"{split}=d[{key!r}]" for split, key in known.items())
    elif found:
        given = f"images=numpy.concatenate([{', '.join(f'd[{key!r}]' for key in found)}])"
    elif len(present) == 1:
        given = f"images=d[{present[0]!r}]"
    else:
        return ""
    return f". With d = numpy.load(FILE): numpy.savez(NEW_FILE, {given})"


def _strip_folder(key: str) -> str:
    return key.rpartition("/")[2].lower()


def check_num_bytes(header: Header, *, key: str, num_bytes: int) -> None:
    """Raises DatasetError if the data of an array would be more than what follows its header."""
    if num_bytes < header.num_bytes or header.num_bytes > MAX_DATASET_BYTES:
        raise DatasetError(f"{key} claims {header.num_bytes} bytes, which the file does not hold")


def read_data(file: IO[bytes], header: Header, *, key: str) -> npt.NDArray[Any]:
    """The whole array behind a header that was just read. Raises DatasetError."""
    file.seek(0)
    try:
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise DatasetError(f"{key} cannot be read: {error}") from None
    assert array.shape == header.shape
    return array


def _suggest_shape(shape: tuple[int, ...], *, minimum: int) -> str:
    """The line of Python that gives the shape that is needed, if there is one."""
    match shape:
        case (_, _, _, 1):
            return "; array.squeeze(-1) has it"
        case (_, 1, _, _):
            return "; array.squeeze(1) has it"
        case (_, _, _, 10):
            return "; array.argmax(-1) has it"
        case (_, cells) if cells > 0 and math.isqrt(cells) ** 2 == cells and shape[0] != cells:
            size = math.isqrt(cells)
            return f"; array.reshape(-1, {size}, {size}) has it, if its rows are grids"
        case (number, _, _) if 0 < number < minimum:
            return "; fewer grids are divided by hand, into train, val and test"
    return ""


def _check_size(shape: tuple[int, ...], *, key: str) -> None:
    height, width = shape[1:]
    if height == width and height % 4 == 0 and 4 <= height <= MAX_GRID_SIZE:
        return
    raise DatasetError(
        f"{key} has grids of {height}x{width}; square grids are needed, of a size "
        f"divisible by 4 and at most {MAX_GRID_SIZE}. {_suggest_size(height, width, key=key)}"
    )


def _suggest_size(height: int, width: int, *, key: str) -> str:
    """How grids get a size that is allowed."""
    if max(height, width) > MAX_GRID_SIZE:
        return (
            f"`losslab data import FILE --crop {MAX_GRID_SIZE} --pad {MAX_GRID_SIZE}` (or "
            f"?crop={MAX_GRID_SIZE}&pad={MAX_GRID_SIZE}) keeps their top left part"
        )
    size = max(4, -(-max(height, width) // 4) * 4)
    return (
        f"`losslab data import FILE --pad {size}` (or ?pad={size}) pads them with background, and "
        f"so does numpy.pad({key}, ((0, 0), (0, {size - height}), (0, {size - width})))"
    )
