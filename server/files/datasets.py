"""Uploaded data sets: `.npz` files in the data directory, read as untrusted input."""

import filecmp
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Final, NamedTuple, Self

import numpy as np
from PIL import Image

from server.errors import ConflictError
from server.files.filesystem import add_file, hold, set_mode, sync_file
from server.files.imports import describe_file, open_grids, read_file
from server.files.npz import DatasetError, Grids
from server.files.orbits import (
    GridKeys,
    Overlap,
    compute_keys,
    count_overlap,
    count_repeats,
    join_keys,
)
from server.files.packed import PackedGrids, have_same_grids
from server.models.configuration import NUM_COLOURS, BuiltInDataset
from server.models.names import is_name, suggest_name
from server.texts import list_some

NUM_SAMPLE_GRIDS: Final = 40
#: Of uploads that are not complete.
UPLOAD_SUFFIX: Final = ".part"
#: Of those that are not marked yet as being written.
NEW_SUFFIX: Final = ".new"
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
_MAX_NAME_SHOWN = 64


class LeftOut(NamedTuple):
    """A file in the folder that is no data set."""

    file_name: str
    reason: str


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


def describe_use(summary: Mapping[str, Any] | None) -> str | None:
    """`40,000 of 120,000 used` for the training grids of a job that has a sample of its data; None
    if it has all of them, or has not read them yet."""
    num_used = (summary or {}).get("num_train")
    num_available = (summary or {}).get("num_available", {}).get("train")
    if num_used is None or num_available is None:
        return None
    return f"{num_used:,} of {num_available:,} used"


def read_npz(name: str, *, datasets_dir: Path) -> dict[str, Grids]:
    """Read `datasets_dir/name.npz`. Raises DatasetError."""
    return read_file(find_npz(name, datasets_dir=datasets_dir))


def list_npz(datasets_dir: Path) -> list[Path]:
    """The files of the uploaded data sets, sorted by name."""
    return [path for path in _list_folder(datasets_dir) if _find_fault(path) is None]


def have_same_content(upload_path: Path, path: Path) -> bool:
    """Whether two files are the same, or only packed in another way."""
    if filecmp.cmp(upload_path, path, shallow=False):
        return True
    try:
        with open_grids(upload_path) as new, open_grids(path) as old:
            return have_same_grids(new, old)
    except DatasetError:
        return False


def list_left_out(datasets_dir: Path) -> list[LeftOut]:
    """The other files in the folder, sorted by name, each with the reason."""
    faults = ((path, _find_fault(path)) for path in _list_folder(datasets_dir))
    return [LeftOut(_show(path), fault) for path, fault in faults if fault is not None]


def _list_folder(datasets_dir: Path) -> list[Path]:
    """What lies in the folder, sorted by name, without hidden files such as uploads."""
    if not datasets_dir.is_dir():
        return []
    found = (path for path in datasets_dir.iterdir() if not path.name.startswith("."))
    return sorted(found, key=lambda path: (path.stem, path.suffix))


def _find_fault(path: Path) -> str | None:
    """Why a file in the folder is no data set; None if it is one by its name."""
    if path.is_symlink():
        return "it is a link; copy the file itself"
    if not path.is_file():
        return "it is no file"
    if path.suffix != ".npz":
        if path.suffix.lower() == ".npz":
            return f"its name ends in {path.suffix}; rename it to {path.stem}.npz"
        return describe_file(path)
    if path.stem in set(BuiltInDataset):
        return f"{path.stem} is the name of a built-in data set; rename it"
    if not is_name(path.stem):
        better = suggest_name(path.name)
        example = f", for example to {better}.npz" if better else ""
        return f"a name has 1 to 64 letters from A to Z, digits, _ and -; rename the file{example}"
    return None


def _show(path: Path) -> str:
    """The name of a file, which may be in no encoding."""
    return os.fsencode(path.name).decode(errors="replace")


def check_present(name: str, *, datasets_dir: Path) -> None:
    """Raises DatasetError unless a data set has the name."""
    if name not in set(BuiltInDataset):
        find_npz(name, datasets_dir=datasets_dir)


def check_free(name: str) -> None:
    """Raises DatasetExistsError for the name of a built-in data set."""
    if name in set(BuiltInDataset):
        raise DatasetExistsError(f"{name} is built in; use another name")


@contextmanager
def open_upload(datasets_dir: Path) -> Iterator[IO[bytes]]:
    """A temporary file for an upload, which others leave alone as long as it is open.

    It gets its suffix only once it is marked, so that one without a mark has lost its process.
    """
    datasets_dir.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=datasets_dir, prefix=".", suffix=NEW_SUFFIX, delete=False) as file:
        try:
            path = Path(file.name)
            hold(path, file.fileno())
            file.name = str(path.rename(path.with_suffix(UPLOAD_SUFFIX)))
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


def seal_upload(file: IO[bytes]) -> None:
    """Put a complete upload on disk, with the mode of the files that are kept."""
    file.flush()
    sync_file(Path(file.name), file.fileno())
    set_mode(Path(file.name))


def add_upload(file: IO[bytes], path: Path) -> None:
    """Give a sealed upload its name. Raises FileExistsError."""
    add_file(Path(file.name), path)


@dataclass(frozen=True, slots=True)
class DatasetContents:
    """The contents of a data set, over all splits."""

    num_grids: dict[str, int]  #: by split; `images` is split by the job that uses it
    grid_size: int
    colour_counts: list[int]  #: cells of each colour
    #: Of `val` and `test` the grids that also occur in `train`; of `images` those that repeat an
    #: earlier one, since a job may put one into training and the other one into another split.
    overlap: dict[str, Overlap]
    sample: Grids  #: grids from all over the first split, (N, S, S)

    @classmethod
    def of(cls, packed: PackedGrids) -> Self:
        """Reads everything once."""
        scans = {key: _scan(packed, key) for key in packed.num_grids}
        return cls(
            num_grids=packed.num_grids,
            grid_size=packed.grid_size,
            colour_counts=np.sum([scan.colour_counts for scan in scans.values()], axis=0).tolist(),
            overlap=find_overlap({key: scan.keys for key, scan in scans.items()}),
            sample=next(iter(scans.values())).sample,
        )


class _Scan(NamedTuple):
    """What is kept of an array."""

    colour_counts: list[int]
    keys: GridKeys
    sample: Grids


def _scan(packed: PackedGrids, key: str) -> _Scan:
    num_grids, start = packed.num_grids[key], 0
    # From all over the array, which may be in order.
    places = np.linspace(0, num_grids - 1, min(num_grids, NUM_SAMPLE_GRIDS)).astype(int)
    scans = []
    for piece in packed.iterate(key):
        end = start + len(piece)
        chosen = piece[places[(places >= start) & (places < end)] - start]
        scans.append(_Scan(count_colours(piece), compute_keys(piece), chosen))
        start = end
    counts, keys, samples = zip(*scans, strict=True)
    return _Scan(np.sum(counts, axis=0).tolist(), join_keys(keys), np.concatenate(samples))


def measure_overlap(arrays: Mapping[str, Grids]) -> dict[str, Overlap]:
    """The grids of each split but training that also occur there; of `images` alone, those that
    repeat an earlier one."""
    return find_overlap({key: compute_keys(grids) for key, grids in arrays.items()})


def find_overlap(keys: Mapping[str, GridKeys]) -> dict[str, Overlap]:
    """The same by the keys of the grids."""
    if "images" in keys:
        return {"images": count_repeats(keys["images"])}
    return {
        split: count_overlap(each, known=keys["train"])
        for split, each in keys.items()
        if split != "train"
    }


def find_npz(name: str, *, datasets_dir: Path) -> Path:
    """The file of an uploaded data set. Raises DatasetError if there is none."""
    available = {path.stem: path for path in list_npz(datasets_dir)}
    # The name is compared with the folder's listing, so no name can lead out of the folder.
    if name not in available:
        raise DatasetError(_describe_missing(name, available, datasets_dir=datasets_dir))
    return available[name]


def _describe_missing(name: str, available: Iterable[str], *, datasets_dir: Path) -> str:
    """What there is in place of a data set, and how it can be added."""
    better = suggest_name(name)
    known = [*BuiltInDataset, *available]
    message = f"there is no data set {name[:_MAX_NAME_SHOWN]!r}; known are {list_some(known)}"
    for file in list_left_out(datasets_dir):
        if suggest_name(file.file_name) in (name, better):
            return f"{message}. {file.file_name} lies in datasets/ and is left out: {file.reason}"
    if is_name(name):
        return f"{message}. PUT /datasets/{name} or a file {name}.npz in datasets/ adds it"
    return f"{message}. Did you mean {better}?" if better in known else message


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
