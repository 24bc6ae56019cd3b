"""Checkpoints: one safetensors file with everything that a job needs to continue and, as its
metadata, the configuration and the position. It cannot contain code."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from server.files.artifacts import JobFiles
from server.files.hashes import compute_sha256
from server.models.configuration import TrainingConfig, read_config
from server.models.tables import Artifact, ResumePoint
from worker.step import StepPath
from worker.training import TrainingState

_FORMAT = "losslab-1"

_logger = logging.getLogger(__name__)


class _Candidate(NamedTuple):
    epoch: int
    step: int
    file_name: str
    sha256: str


def save_checkpoint(path: Path, state: TrainingState, *, config: TrainingConfig) -> None:
    metadata = {
        "config": config.model_dump_json(),
        "epoch": str(state.epoch),
        "step": str(state.step),
        **({"step_path": state.path} if state.path else {}),
        "format": _FORMAT,
    }
    # Written by Python, so that a full disk is an OSError like any other.
    path.write_bytes(_sort_header(save(state.tensors, metadata=metadata)))


def _sort_header(content: bytes) -> bytes:
    """The same safetensors file with its header in order, so that equal states have equal bytes.

    Safetensors writes the metadata in the order of a hash table, another one each time. A file is
    the header's length (8 bytes, little-endian), the header as JSON, padded with spaces to a
    multiple of 8 bytes, and the tensors at places that are counted from the header's end.
    """
    header = json.dumps(
        _read_header(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[_find_tensors(content) :]


def _read_header(content: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(content[8 : _find_tensors(content)])
    return header


def _find_tensors(content: bytes) -> int:
    """Where the header ends."""
    return 8 + int.from_bytes(content[:8], "little")


def load_checkpoint(path: Path) -> tuple[TrainingState, TrainingConfig]:
    """Raises SafetensorError, also for a file of another program."""
    # Read and not mapped into memory: some file systems cannot map, and a mapped file that another
    # program cuts ends the process.
    content = path.read_bytes()
    tensors: dict[str, Tensor] = load(content)
    metadata = _read_header(content).get("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise SafetensorError(f"{path.name} is no checkpoint of Losslab")
    config = read_config(json.loads(metadata["config"]))
    state = TrainingState(
        tensors,
        epoch=int(metadata["epoch"]),
        step=int(metadata["step"]),
        path=_read_path(metadata.get("step_path")),
    )
    return state, config


def _read_path(stored: str | None) -> StepPath | None:
    """None for a checkpoint of another version that does not say it, or in words of its own."""
    return StepPath(stored) if stored in set(StepPath) else None


def load_newest_state(
    files: JobFiles,
    rows: list[Artifact],
    *,
    resume_point: ResumePoint | None = None,
    warn: Callable[[str], None] = lambda _message: None,
) -> TrainingState | None:
    """The newest state that `rows` or `resume_point` name and whose file is as it was written.

    A file that is missing or whose hash differs is skipped for the one before, with a warning.
    """
    named = [_Candidate(row.epoch, 0, row.file_name, row.sha256) for row in rows]
    if resume_point is not None:
        point = resume_point
        named.append(_Candidate(point.epoch, point.step, point.file_name, point.sha256))
    return _load_first(files, sorted(named, reverse=True), warn=warn)


def load_first_state(
    files: JobFiles, rows: list[Artifact], *, warn: Callable[[str], None]
) -> TrainingState | None:
    """As `load_newest_state`, in the order of `rows`."""
    named = [_Candidate(row.epoch, 0, row.file_name, row.sha256) for row in rows]
    return _load_first(files, named, warn=warn)


def load_verified(files: JobFiles, row: Artifact) -> TrainingState:
    """The state of one checkpoint. Raises OSError if the file is missing or was changed, and
    SafetensorError."""
    return load_checkpoint(files.verified_path(row.file_name, sha256=row.sha256))[0]


def _load_first(
    files: JobFiles, candidates: list[_Candidate], *, warn: Callable[[str], None]
) -> TrainingState | None:
    for candidate in candidates:
        try:
            path = files.path(candidate.file_name)
            if compute_sha256(path) == candidate.sha256:
                return load_checkpoint(path)[0]
            message = f"{candidate.file_name} does not match its sha256 and is skipped"
        except (OSError, SafetensorError) as error:
            message = f"{candidate.file_name} cannot be loaded and is skipped: {error}"
        _logger.warning(message)
        warn(message)
    return None
