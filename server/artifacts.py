"""Where a job's files lie: `runs/{job_id}/` with `job.log` and `checkpoints/`.

Files are written under a temporary name, synced and renamed; the row that names one follows.
`best.*` are links to the files of the best epoch, which no row names.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.models import ArtifactKind

_JOB_ID = re.compile(r"^[0-9a-f]{12}$")
_FILE_NAMES = {
    ArtifactKind.checkpoint: "checkpoint_epoch_{epoch}.safetensors",
    ArtifactKind.reconstruction: "reconstructions_epoch_{epoch}.png",
}
_BEST_NAMES = {
    ArtifactKind.checkpoint: "best.safetensors",
    ArtifactKind.reconstruction: "reconstructions_best.png",
}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as it was written, for the row that will name it."""

    file_name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files of one job. Making one touches no disk."""

    runs_dir: Path
    job_id: str

    def __post_init__(self) -> None:
        assert _JOB_ID.match(self.job_id), f"not a job id: {self.job_id!r}"

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
        """The path of a file that a row names. Raises FileNotFoundError if it is missing, a
        link, or not directly in the folder."""
        path = self.checkpoints_dir / file_name
        if path.parent != self.checkpoints_dir or path.is_symlink() or not path.is_file():
            raise FileNotFoundError(f"{file_name} of job {self.job_id} is not on disk")
        return path

    def write(
        self, kind: ArtifactKind, *, epoch: int, write_to: Callable[[Path], None]
    ) -> StoredFile:
        """Let `write_to` fill a temporary file, then sync it and give it its name."""
        path = self.checkpoints_dir / _FILE_NAMES[kind].format(epoch=epoch)
        descriptor, temporary = tempfile.mkstemp(
            dir=self.checkpoints_dir, prefix=".", suffix=path.suffix
        )
        os.close(descriptor)
        try:
            write_to(Path(temporary))
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # mkstemp is private by default, but the server may run as another user.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_dir(self.checkpoints_dir)
        return StoredFile(path.name, path.stat().st_size, compute_sha256(path))

    def link_best(self, kind: ArtifactKind, *, epoch: int) -> None:
        """Point `best.*` at the file of `epoch`, once a row names that file."""
        target = self.checkpoints_dir / _FILE_NAMES[kind].format(epoch=epoch)
        link = self.checkpoints_dir / _BEST_NAMES[kind]
        temporary = link.with_name(f".{link.name}")
        temporary.unlink(missing_ok=True)
        os.link(target, temporary)
        os.replace(temporary, link)
        # Renaming onto a link to the same file does nothing and leaves the temporary name.
        temporary.unlink(missing_ok=True)

    def remove(self, file_name: str) -> None:
        """Remove a file that no row names any more."""
        (self.checkpoints_dir / file_name).unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the job's folder with everything in it."""
        if self.job_dir.exists():
            shutil.rmtree(self.job_dir)

    def read_log(self, *, tail: int | None = None) -> str:
        """The run's log, or its last `tail` lines; empty before the run."""
        if not self.log_path.exists():
            return ""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return text if tail is None else "".join(text.splitlines(keepends=True)[-tail:])


def compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_dir(directory: Path) -> None:
    """A rename is on disk only once its folder is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
