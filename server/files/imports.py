"""What a file is, and how it becomes grids.

`FORMATS` is the registry. A format that is taken has a function that reads it; one that is known
but not taken has the way out. A new one is one entry, and one function if it is taken.
"""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from server.files.arc import MAX_JSON_BYTES, Corpus, NoTaskError, Task, split_tasks, stack
from server.files.npz import (
    BROKEN_ARCHIVE,
    MAX_DATASET_BYTES,
    MAX_GRID_SIZE,
    MAX_UNPACKED_BYTES,
    MIN_IMAGES,
    Arrays,
    DatasetError,
    Grids,
    check_grids,
    check_header,
    is_hidden,
    open_archive,
    read_header,
    write_npz,
)
from server.files.packed import PackedGrids, read_arrays, read_npy
from server.models.names import suggest_name

_HEAD_BYTES: Final = 512
_ADVICE: Final = "numpy.savez(file, images=array) makes an .npz"


@dataclass(frozen=True, slots=True)
class Fit:
    """How grids of other sizes get one that is allowed; None leaves them as they are."""

    pad: int | None = None  #: the size up to which they are filled up with background
    crop: int | None = None  #: the size to which larger ones are cut, from the top left

    def __bool__(self) -> bool:
        return self.pad is not None or self.crop is not None


@dataclass(frozen=True, slots=True)
class Imported:
    """Grids that are ready to be stored, and what was done to get them."""

    arrays: dict[str, Grids]
    note: str


Read = Callable[[Path, Fit], Imported]


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of file: how its first bytes look, and either who reads it or what helps."""

    title: str
    pattern: re.Pattern[bytes]
    remedy: str = ""
    read: Read | None = None


def read_file(path: Path, *, shown_name: str = "") -> dict[str, Grids]:
    """Read an `.npz` file: keys `train`, `val` and `test`, or `images` alone.

    Each array is (N, S, S) uint8 with colours 0-9. Nothing is unpickled. Raises DatasetError, which
    says what the file is if it is another one.
    """
    with open_grids(path, shown_name=shown_name) as packed:
        return {key: packed.read(key) for key in packed.num_grids}


@contextmanager
def open_grids(
    path: Path, *, shown_name: str = "", max_bytes: int = MAX_DATASET_BYTES
) -> Iterator[PackedGrids]:
    """The grids of an `.npz` file, to be read piece by piece. Raises DatasetError as `read_file`,
    also while pieces are read."""
    name = shown_name or path.name
    try:
        found = recognise(path)
        if found is not NPZ:
            raise DatasetError(_describe(found, path))
        with open_archive(path, max_bytes=max_bytes) as archive:
            _refuse_other_archives(archive.namelist())
            if _holds_tasks(archive.namelist()):
                raise DatasetError(f"is a zip of JSON, such as ARC tasks; {_IMPORT}")
            yield PackedGrids(archive)
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from None
    except BROKEN_ARCHIVE as error:
        raise DatasetError(f"{name} is no readable .npz file (truncated?): {error}") from None


def import_file(path: Path, *, fit: Fit, shown_name: str = "") -> Imported:
    """Read a file of any format that is taken. Raises DatasetError."""
    name, found = shown_name or path.name, None
    try:
        check_fit(fit)
        found = recognise(path)
        if found is None or found.read is None:
            raise DatasetError(_describe(found, path))
        return found.read(path, fit)
    except DatasetError as error:
        raise DatasetError(f"{name}: {error}") from None
    except BROKEN_ARCHIVE as error:
        kind = "no readable .npz file" if found is NPZ else "not readable"
        raise DatasetError(f"{name} is {kind} (truncated?): {error}") from None


def convert_upload(file: IO[bytes], *, fit: Fit, shown_name: str) -> str | None:
    """Rewrite a temporary file as an `.npz` unless it is one already and stays as it is; returns
    what was done to it. Raises DatasetError."""
    file.flush()
    path = Path(file.name)
    if recognise(path) is NPZ and not fit and not _has_tasks(path):
        return None
    imported = import_file(path, fit=fit, shown_name=shown_name)
    file.seek(0)
    file.truncate()
    write_npz(file, imported.arrays)
    file.flush()
    return imported.note


def recognise(path: Path) -> Format | None:
    """The format of a file by its first bytes; None if they are of none that is known."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return next((each for each in FORMATS if each.pattern.match(head)), None)


def describe_file(path: Path) -> str:
    """Why a file in the folder of data sets is none, and what helps."""
    name = suggest_name(path.name) or "NAME"
    importing = f"`losslab data import FILE --name {name}`"
    try:
        found = recognise(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if found is None:
        return "it is no .npz file"
    if found.read is not None:
        return f"its name does not end in .npz; {importing} takes {found.title}"
    return f"it is {found.title}; {found.remedy}"


def check_fit(fit: Fit) -> None:
    """Raises DatasetError unless the sizes are ones that grids may have."""
    for name, size in (("pad", fit.pad), ("crop", fit.crop)):
        if size is not None and (size % 4 or not 4 <= size <= MAX_GRID_SIZE):
            allowed = f"4, 8, 12 and so on up to {MAX_GRID_SIZE}"
            raise DatasetError(f"{name} is one of {allowed}, not {size}")
    if fit.pad and fit.crop and fit.pad != fit.crop:
        raise DatasetError("pad and crop are the same size, or one of them is left out")


# -- the formats that are taken


def import_zip(path: Path, fit: Fit) -> Imported:
    """An `.npz`, or a zip of ARC tasks."""
    with open_archive(path, max_bytes=MAX_UNPACKED_BYTES) as archive:
        names = archive.namelist()
        _refuse_other_archives(names)
        if _holds_tasks(names):
            return _import_tasks(_read_corpus(archive, _list_tasks(names)), fit=fit)
        return _fit_arrays(read_arrays(archive), fit=fit)


def import_json(path: Path, fit: Fit) -> Imported:
    """An ARC task, or many of them by their ids."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise DatasetError(
            f"is JSON of {size} bytes; {MAX_JSON_BYTES} are allowed. A zip with one file per task "
            "may be larger"
        )
    corpus = Corpus()
    corpus.add_file(path.read_bytes(), name="task")
    return _import_tasks(corpus, fit=fit)


def import_npy(path: Path, fit: Fit) -> Imported:
    """A single array of grids, which jobs then split."""
    return _fit_arrays({"images": read_npy(path)}, fit=fit)


def _read_corpus(archive: zipfile.ZipFile, names: Iterable[str]) -> Corpus:
    corpus = Corpus()
    for name in names:
        num_bytes = archive.getinfo(name).file_size
        if num_bytes > MAX_JSON_BYTES:
            raise DatasetError(f"holds {name[:100]!r}, which is above {MAX_JSON_BYTES} bytes")
        try:
            corpus.add_file(archive.read(name), name=name)
        except NoTaskError:
            corpus.leave_out(name, num_bytes=num_bytes)
        except DatasetError as error:
            raise DatasetError(f"{name[:100]} {error}") from None
    return corpus


def _import_tasks(corpus: Corpus, *, fit: Fit) -> Imported:
    tasks = corpus.list_tasks()
    arrays = stack(split_tasks(tasks), pad=fit.pad, crop=fit.crop)
    note = _describe_tasks(tasks, arrays)
    if corpus.num_repeated:
        note += f"; {corpus.num_repeated:,} more were there twice"
    if corpus.left_out:
        shown = ", ".join(name[-60:] for name in corpus.left_out[:3])
        number = len(corpus.left_out)
        note += f"; {number:,} other file{'s' * (number != 1)} left out, such as {shown}"
    return Imported(arrays, note)


def _describe_tasks(tasks: list[Task], arrays: Mapping[str, Grids]) -> str:
    """`20 ARC tasks: 160 grids, filled up to 12x12 with background; 128 are for training, ...`."""
    shapes = [grid.shape for task in tasks for pair in task.pairs for grid in pair]
    size = arrays["train"].shape[1]
    num_cut = sum(max(shape) > size for shape in shapes)
    num = {split: len(grids) for split, grids in arrays.items()}
    unit = "task" if len(tasks) >= len(num) else "pair"
    return (
        f"{len(tasks)} ARC task{'s' * (len(tasks) != 1)}: {len(shapes):,} grids, filled up to "
        f"{size}x{size} with background"
        + (f", {num_cut:,} of them cut" if num_cut else "")
        + f"; split by {unit}: {num['train']:,} grids for training, {num['val']:,} for validation, "
        f"{num['test']:,} for testing"
    )


def _fit_arrays(arrays: Arrays, *, fit: Fit) -> Imported:
    fitted = {key: _fit_array(array, fit=fit, key=key) for key, array in arrays.items()}
    changed = sum(fitted[key].shape != array.shape for key, array in arrays.items())
    grids = check_grids(fitted)
    num = ", ".join(f"{key} {len(array):,}" for key, array in grids.items())
    size = next(iter(grids.values())).shape[1]
    done = f", fitted to {size}x{size}" if changed else ""
    return Imported(grids, f"grids: {num}{done}")


def _fit_array(array: Any, *, fit: Fit, key: str) -> Any:
    """Grids (N, H, W) that are cut to `crop`, then filled up to `pad`."""
    if fit.crop is not None:
        array = array[:, : fit.crop, : fit.crop]
    if fit.pad is None or array.shape[1:] == (fit.pad, fit.pad):
        return array
    height, width = array.shape[1:]
    if max(height, width) > fit.pad:
        raise DatasetError(
            f"{key} has grids of {height}x{width}, larger than {fit.pad}x{fit.pad}; "
            f"`--crop {fit.pad}` (or ?crop={fit.pad}) keeps their top left part"
        )
    if len(array) * fit.pad**2 * array.dtype.itemsize > MAX_DATASET_BYTES:
        raise DatasetError(f"{key} would be larger than {MAX_DATASET_BYTES} bytes")
    return np.pad(array, ((0, 0), (0, fit.pad - height), (0, fit.pad - width)))


# -- what a file is


def _has_tasks(path: Path) -> bool:
    """Whether a zip holds no array, but files that may be ARC tasks."""
    try:
        with open_archive(path, max_bytes=MAX_UNPACKED_BYTES) as archive:
            names = archive.namelist()
    except (DatasetError, *BROKEN_ARCHIVE):
        return False  # said when it is read
    return _holds_tasks(names)


def _holds_tasks(names: Iterable[str]) -> bool:
    """Whether there is no array, but files that may be ARC tasks."""
    return not any(name.endswith(".npy") for name in names) and bool(_list_tasks(names))


def _list_tasks(names: Iterable[str]) -> list[str]:
    """The JSON files of an archive, without what macOS adds and hidden files."""
    return [name for name in names if name.lower().endswith(".json") and not is_hidden(name)]


def _refuse_other_archives(names: Iterable[str]) -> None:
    """Raises DatasetError for the other kinds of files that are zip archives inside."""
    names = list(names)
    for name in names:
        for pattern, message in _OTHER_ARCHIVES.items():
            if pattern.search(name):
                raise DatasetError(message)
    packed = [name for name in names if _PACKED.search(name) and not is_hidden(name)]
    if packed and not any(name.endswith(".npy") for name in names):
        raise DatasetError(f"holds {packed[0][-60:]!r}; {_UNPACK}")


def _describe(found: Format | None, path: Path) -> str:
    """What a file is that is no `.npz`, and what helps."""
    if found is None and zipfile.is_zipfile(path):
        return f"is an archive with other bytes before it, no readable .npz file; {_BARE}"
    if found is None:
        return "is no readable .npz file, and no .npy, zip or JSON either"
    if found.title == _NPY:
        return f"is {found.title}; {_advise_on_npy(path)}"
    return f"is {found.title}, no readable .npz file; {found.remedy}"


def _advise_on_npy(path: Path) -> str:
    """The way to an `.npz`, unless the array itself is the fault."""
    try:
        with path.open("rb") as file:
            header = read_header(file, key="the array")
    except DatasetError:
        return _ADVICE
    try:
        check_header(header, key="the array", minimum=MIN_IMAGES)
    except DatasetError as error:
        return str(error)
    return f"{_ADVICE}, and so does `losslab data import`"


_NPY: Final = "a single array (.npy)"
_IMPORT: Final = "`losslab data import FILE --name NAME` takes it"
_BARE: Final = "send the bare file: curl -T FILE URL"
_UNPACK: Final = "unpack it first, and send the file inside"
_AS_ARRAY: Final = "read it as an array of whole numbers (N, S, S); " + _ADVICE
_NOT_UNPICKLED: Final = (
    "nothing is ever unpickled. Load it where you trust it, and save its arrays: " + _ADVICE
)
#: Files in an archive that hold the data in their turn.
_PACKED: Final = re.compile(r"(?i)\.(npz|zip|7z|rar|tar|gz|bz2|xz|zst|tgz)\Z")
_OTHER_ARCHIVES: Final[dict[re.Pattern[str], str]] = {
    re.compile(r"(^|/)data\.pkl$"): (
        "is a file of PyTorch, which is a pickle; with t = torch.load(FILE, weights_only=True): "
        "numpy.savez(NEW_FILE, images=t.numpy())"
    ),
    re.compile(r"^\[Content_Types\]\.xml$"): f"is an office document; {_AS_ARRAY}",
}


def _name(title: str, pattern: bytes, remedy: str) -> Format:
    return Format(title, re.compile(pattern, re.DOTALL), remedy)


NPZ: Final = Format("a zip archive", re.compile(rb"PK\x03\x04"), read=import_zip)
#: Looked at in this order.
FORMATS: Final[tuple[Format, ...]] = (
    NPZ,
    Format(_NPY, re.compile(rb"\x93NUMPY"), read=import_npy),
    Format(
        "ARC JSON, or other JSON",
        re.compile(rb"(\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\0]*[\[{]"),
        _IMPORT,
        read=import_json,
    ),
    _name("an empty file", rb"\Z", "the transfer sent nothing"),
    _name("an empty archive", rb"PK\x05\x06", "it holds no array"),
    _name(
        "a form, of which the file is a part (multipart)",
        rb"(?i)--[^\r\n]{1,200}\r?\ncontent-",
        _BARE,
    ),
    _name("compressed with gzip", rb"\x1f\x8b", "gunzip it first, and send the file inside"),
    _name("compressed with bzip2", rb"BZh[1-9]", _UNPACK),
    _name("compressed with xz", rb"\xfd7zXZ\x00", _UNPACK),
    _name("compressed with zstd", rb"\x28\xb5\x2f\xfd", _UNPACK),
    _name("a 7z archive", rb"7z\xbc\xaf\x27\x1c", _UNPACK + "; a zip of ARC tasks is taken"),
    _name("a RAR archive", rb"Rar!\x1a\x07", _UNPACK + "; a zip of ARC tasks is taken"),
    _name("a tar archive", rb".{257}ustar", "make a zip of the ARC tasks, or send the .npz inside"),
    _name(
        "a pickle",
        rb"\x80[\x02-\x05]|\([dl]p0\n|c(numpy|torch|pandas|copy_reg|builtins|__builtin__|collections)[\w.]*\n",
        _NOT_UNPICKLED,
    ),
    _name("an HDF5 file", rb"\x89HDF\r\n", _AS_ARRAY),
    _name("a Parquet file", rb"PAR1", _AS_ARRAY),
    _name("an Arrow file", rb"ARROW1|\xff\xff\xff\xff.\x00\x00\x00", _AS_ARRAY),
    _name("a MATLAB file", rb"MATLAB ", _AS_ARRAY),
    _name("a safetensors file", rb".{6}\x00\x00\{", _AS_ARRAY),
    _name("a picture", rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{12}|RIFF.{4}WEBP|II\*\0|MM\0\*", _AS_ARRAY),
    _name("an SQLite database", rb"SQLite format 3\0", _AS_ARRAY),
    _name("an HTML page", rb"\s*<", "a site may send one in place of a file; get the file itself"),
    _name(
        "a pointer of Git LFS",
        rb"version https://git-lfs",
        "git lfs pull fetches the file that it stands for",
    ),
    _name("an archive with other bytes before it", rb".*PK\x03\x04", _BARE),
    _name("a text, such as CSV", rb"[^\x00-\x08\x0e-\x1f]*[0-9A-Za-z\"][,;\t]", _AS_ARRAY),
)
