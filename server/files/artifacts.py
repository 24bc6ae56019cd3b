"""A job's files: `runs/{job_id}/` with `job.log` and `checkpoints/`.

A file is written under a temporary name, synced and renamed before its row is committed.
`best.*` are links to the files of the best epoch, or copies; no row names them.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.files.filesystem import (
    FileIdentity,
    drop_from_page_cache,
    find_identity,
    identify,
    link_or_copy,
    remove_if_unchanged,
    set_mode,
    sync_file,
    sync_folder,
)
from server.files.hashes import find_sha256
from server.models.tables import ArtifactKind

_JOB_ID_PATTERN = re.compile(r"^[0-9a-f]{12}$")
#: The file of an epoch, by the kind of artifact.
FILE_NAMES: Final = {
    ArtifactKind.checkpoint: "checkpoint_epoch_{epoch}.safetensors",
    ArtifactKind.reconstruction: "reconstructions_epoch_{epoch}.png",
}
_BEST_NAMES: Final = {
    ArtifactKind.checkpoint: "best.safetensors",
    ArtifactKind.reconstruction: "reconstructions_best.png",
}

_logger = logging.getLogger(__name__)


class LostFileError(OSError):
    """A temporary file is gone or was cut before it got its name, or another worker has taken the
    name meanwhile."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A complete and synced file under a temporary name, with the values for its row."""

    temporary_path: Path
    path: Path
    size_bytes: int
    sha256: str
    #: The file that had the final name when this one was begun.
    former: FileIdentity | None

    @property
    def file_name(self) -> str:
        return self.path.name

    def publish(self) -> None:
        """Rename the file to its final name; a repeated call does nothing.

        Raises LostFileError, so that no row names what is not there, and a worker that was frozen
        replaces nothing that its successor wrote.
        """
        try:
            size_bytes = self.temporary_path.stat().st_size
        except FileNotFoundError:
            if self._is_published():
                return
            raise LostFileError(f"{self.file_name} vanished before it was stored") from None
        if size_bytes != self.size_bytes:
            raise LostFileError(f"{self.file_name} was changed before it was stored")
        if find_identity(self.path) != self.former:
            raise LostFileError(f"another worker has stored {self.file_name} meanwhile")
        os.replace(self.temporary_path, self.path)
        sync_folder(self.path.parent)

    def _is_published(self) -> bool:
        is_whole = self.path.is_file() and self.path.stat().st_size == self.size_bytes
        return is_whole and find_sha256(self.path) == self.sha256

    def discard(self) -> None:
        self.temporary_path.unlink(missing_ok=True)


def list_job_ids(runs_dir: Path) -> list[str]:
    """The jobs that have a folder."""
    if not runs_dir.is_dir():
        return []
    return [name for name in os.listdir(runs_dir) if _JOB_ID_PATTERN.match(name)]


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files of one job. Creating this object does not access the disk."""

    runs_dir: Path
    job_id: str

    def __post_init__(self) -> None:
        assert _JOB_ID_PATTERN.match(self.job_id), f"not a job id: {self.job_id!r}"

    @property
    def job_dir(self) -> Path:
        return self.runs_dir / self.job_id

    @property
    def checkpoints_dir(self) -> Path:
        return self.job_dir / "checkpoints"

    @property
    def log_path(self) -> Path:
        return self.job_dir / "job.log"

    def create(self) -> None:
        self.checkpoints_dir.mkdir(parents=True, exist_ok=True)

    def path(self, file_name: str) -> Path:
        """The path of a file that a row names.

        Raises FileNotFoundError if it is missing, a link, or not directly in the folder.
        """
        path = self.checkpoints_dir / file_name
        if path.parent != self.checkpoints_dir or not self._is_own_file(path):
            raise FileNotFoundError(f"{file_name} of job {self.job_id} is not on disk")
        return path

    def verified_path(self, file_name: str, *, sha256: str) -> Path:
        """Like `path`, but also raises FileNotFoundError if the content has changed."""
        path = self.path(file_name)
        if find_sha256(path) != sha256:
            raise FileNotFoundError(
                f"{file_name} of job {self.job_id} was changed on disk: its sha256 is different"
            )
        return path

    def write(
        self, kind: ArtifactKind, *, epoch: int, write_to: Callable[[Path], None]
    ) -> WrittenFile:
        """Let `write_to` fill a temporary file, and sync it; `publish` renames it."""
        return self._write(FILE_NAMES[kind].format(epoch=epoch), write_to=write_to)

    def write_resume_point(
        self, *, attempt: int, epoch: int, step: int, write_to: Callable[[Path], None]
    ) -> WrittenFile:
        """Like `write`, for the file from which a job goes on inside an epoch."""
        name = f"resume_attempt_{attempt}_epoch_{epoch}_step_{step}.safetensors"
        return self._write(name, write_to=write_to)

    def list_found(self) -> dict[str, FileIdentity]:
        """The files that are there but for the `best` ones, by name; none before the run."""
        found = {}
        for path in self.checkpoints_dir.iterdir() if self.checkpoints_dir.is_dir() else ():
            if path.name not in _BEST_NAMES.values() and path.is_file():
                with suppress(FileNotFoundError):  # another process has just removed it
                    found[path.name] = identify(path)
        return found

    def sweep(self, found: Mapping[str, FileIdentity], *, named: Collection[str]) -> int:
        """Remove those of the files that no row names, such as those of a killed worker; returns
        their number.

        `found` is what was there before the names were read: a file that was written since is not
        removed, however long this process stood still meanwhile.
        """
        num_removed = 0
        for name in found.keys() - set(named):
            try:
                num_removed += remove_if_unchanged(self.checkpoints_dir / name, found[name])
            except OSError as error:  # for example, another program has it open
                _logger.warning("%s of job %s cannot be removed: %s", name, self.job_id, error)
        return num_removed

    def renew_best(self, best_epoch: int | None, *, named: Collection[str]) -> None:
        """Let the `best` names stand for the best epoch's files. They are a convenience: if that
        fails, they are left out."""
        for kind, best_name in _BEST_NAMES.items():
            best = self.checkpoints_dir / best_name
            target = self.checkpoints_dir / FILE_NAMES[kind].format(epoch=best_epoch)
            try:
                if target.name in named and target.is_file():
                    _point(best, target=target)
                    continue
            except OSError as error:
                _logger.warning("%s of job %s is left out: %s", best_name, self.job_id, error)
            # No file is better than that of an epoch that is no longer the best.
            with suppress(OSError):
                best.unlink(missing_ok=True)

    def _write(self, name: str, *, write_to: Callable[[Path], None]) -> WrittenFile:
        descriptor, temporary = tempfile.mkstemp(
            dir=self.checkpoints_dir, prefix=".", suffix=Path(name).suffix
        )
        os.close(descriptor)
        path, named_path = Path(temporary), self.checkpoints_dir / name
        try:
            if named_path.is_dir():
                raise IsADirectoryError(f"a folder has the name {name}")
            former = find_identity(named_path)
            write_to(path)
            size_bytes, sha256 = _finish(path)
            return WrittenFile(path, named_path, size_bytes, sha256, former)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def identify(self, file_name: str) -> FileIdentity | None:
        """What `remove` needs to know of a file; None if it is missing."""
        assert Path(file_name).name == file_name
        return find_identity(self.checkpoints_dir / file_name)

    def remove(self, file_name: str, identity: FileIdentity | None) -> None:
        """Remove a file whose row was deleted after the file had been identified."""
        if identity is not None:
            remove_if_unchanged(self.checkpoints_dir / file_name, identity)

    def delete(self) -> None:
        """Remove the job's folder with everything in it."""
        if self.job_dir.is_symlink():
            self.job_dir.unlink()  # the link's target does not belong to the job
        elif self.job_dir.exists():
            shutil.rmtree(self.job_dir)

    def read_log(self, *, tail: int | None = None) -> str:
        """The run's log, or its last `tail` lines; empty before the run."""
        if not self._is_own_file(self.log_path):
            return ""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return text if tail is None else "".join(text.splitlines(keepends=True)[-tail:])

    def _is_own_file(self, path: Path) -> bool:
        """Whether the path is a file, and no part of the path below `runs_dir` is a link."""
        own_path = self.runs_dir.resolve() / path.relative_to(self.runs_dir)
        return path.is_file() and path.resolve() == own_path


def _finish(path: Path) -> tuple[int, str]:
    """Sync a file that is complete; returns its size and its hash. Raises LostFileError."""
    try:
        size_bytes = path.stat().st_size
        set_mode(path)
        with path.open("rb+") as file:
            sync_file(path, file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            drop_from_page_cache(path, file.fileno())
            is_whole = os.fstat(file.fileno()).st_size == size_bytes
    except FileNotFoundError:
        raise LostFileError(f"{path.name} vanished before it was stored") from None
    if not is_whole:
        raise LostFileError(f"{path.name} was changed before it was stored")
    return size_bytes, sha256


def _point(best: Path, *, target: Path) -> None:
    """Make `best` a link to a file, or a whole copy of it where there are no links."""
    if best.exists() and (best.samefile(target) or _is_copy(best, target=target)):
        return
    temporary = best.with_name(f".{uuid.uuid4().hex}{best.suffix}")
    try:
        link_or_copy(target, temporary)
        os.replace(temporary, best)
    finally:
        temporary.unlink(missing_ok=True)


def _is_copy(best: Path, *, target: Path) -> bool:
    """Whether it is the copy that a former call made. A link to another file is none."""
    is_alone = best.stat().st_nlink == 1
    has_size = best.stat().st_size == target.stat().st_size
    return is_alone and has_size and find_sha256(best) == find_sha256(target)
