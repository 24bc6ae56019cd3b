"""Checkpoints: one safetensors file with weights, Adam's state and, as its metadata, the
configuration and the epoch. Nothing in it can be code."""

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.artifacts import JobFiles, compute_sha256
from server.models import Artifact, TrainingConfig

_logger = logging.getLogger(__name__)


def save_checkpoint(
    path: Path, state: dict[str, Tensor], *, config: TrainingConfig, epoch: int
) -> None:
    metadata = {"config": config.model_dump_json(), "epoch": str(epoch), "format": "losslab-1"}
    save_file(state, path, metadata=metadata)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], TrainingConfig, int]:
    """Return state, configuration and epoch. Raises SafetensorError."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    config = TrainingConfig.model_validate(json.loads(metadata["config"]))
    return state, config, int(metadata["epoch"])


def load_newest_checkpoint(
    files: JobFiles, rows: list[Artifact]
) -> tuple[dict[str, Tensor], int] | None:
    """The newest of the checkpoints named by `rows` that is as it was written, with its epoch.

    One that is missing or whose hash differs is skipped, with a warning, for the one before.
    """
    for row in sorted(rows, key=lambda row: row.epoch, reverse=True):
        try:
            path = files.path(row.file_name)
            if compute_sha256(path) == row.sha256:
                state, _, epoch = load_checkpoint(path)
                return state, epoch
            _logger.warning("%s does not match its sha256 and is skipped", row.file_name)
        except (FileNotFoundError, SafetensorError) as error:
            _logger.warning("%s cannot be loaded and is skipped: %s", row.file_name, error)
    return None
