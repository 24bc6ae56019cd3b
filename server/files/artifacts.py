"""A job's files: `runs/{job_id}/` with `job.log` and `checkpoints/`.

A file is written under a temporary name, synced and renamed before its row is committed.
`best.*` are links to the files of the best epoch; no row names these links.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A complete and synced file under a temporary name, with the values for its row."""

    temporary_path: Path
    path: Path
    size_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.path.name

    def publish(self) -> None:
        """Rename the file to its final name; a repeated call does nothing."""
        if self.temporary_path.exists():
            os.replace(self.temporary_path, self.path)
            _sync_dir(self.path.parent)

    def discard(self) -> None:
        self.temporary_path.unlink(missing_ok=True)


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

    def sweep(self, named: set[str], best_epoch: int | None) -> None:
        """Remove files that no row names, such as those of a killed worker; update `best` links."""
        for path in self.checkpoints_dir.iterdir():
            if path.name not in named and path.name not in _BEST_NAMES.values() and path.is_file():
                path.unlink()
        for kind, best_name in _BEST_NAMES.items():
            target = self.checkpoints_dir / FILE_NAMES[kind].format(epoch=best_epoch)
            if target.name in named and target.is_file():
                self._link(self.checkpoints_dir / best_name, target=target)
            else:
                # No link is better than a link to an epoch that is no longer the best.
                (self.checkpoints_dir / best_name).unlink(missing_ok=True)

    def _write(self, name: str, *, write_to: Callable[[Path], None]) -> WrittenFile:
        descriptor, temporary = tempfile.mkstemp(
            dir=self.checkpoints_dir, prefix=".", suffix=Path(name).suffix
        )
        os.close(descriptor)
        path = Path(temporary)
        try:
            if (self.checkpoints_dir / name).is_dir():
                raise IsADirectoryError(f"a folder has the name {name}")
            write_to(path)
            # mkstemp makes private files, but the server may run as another user.
            path.chmod(0o644)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                _drop_from_page_cache(file.fileno())
            return WrittenFile(path, self.checkpoints_dir / name, path.stat().st_size, sha256)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _link(self, link: Path, *, target: Path) -> None:
        if link.exists() and link.samefile(target):
            return
        temporary = link.with_name(f".{link.name}")
        temporary.unlink(missing_ok=True)
        os.link(target, temporary)
        os.replace(temporary, link)

    def remove(self, file_name: str) -> None:
        """Remove a file whose row was deleted; the file may be missing."""
        assert Path(file_name).name == file_name
        (self.checkpoints_dir / file_name).unlink(missing_ok=True)

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


def _drop_from_page_cache(descriptor: int) -> None:
    """Let the kernel drop its copy of a synced file, which is rarely read again.

    The next file is then written to the same memory. Otherwise a virtual machine may have to
    request new memory from its host, which takes longer than all other steps.
    """
    if hasattr(os, "posix_fadvise"):  # missing on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_dir(directory: Path) -> None:
    """Sync a folder: a rename is on disk only after that."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
