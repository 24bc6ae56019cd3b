"""Room on the disk: a worker that has none, or may not write there, claims no job."""

import errno
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Final

#: A checkpoint, a resume point, and the one that replaces it.
NEEDED_BYTES: Final = 32 * 2**20
_LOG_SECONDS: Final = 60.0
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_REFUSED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)

_logger = logging.getLogger(__name__)


class Room:
    """Whether the files of another job can be written.

    If not, each job of the queue would be claimed, fail, and lose an attempt.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_doubted = False
        self._told_at: float | None = None

    def doubt(self) -> None:
        """A job could not write its files. What the system says of free space may not count quotas,
        so that from now on it is tried."""
        self._is_doubted = True

    def find_obstacle(self) -> str | None:
        """Until when no job can be run; None if one can. Cheap enough for every claim."""
        obstacle = self._find_obstacle()
        if obstacle is not None:
            self._tell(obstacle)
            return obstacle
        if self._told_at is not None:
            _logger.info("there is room in %s again", self._folder)
        self._told_at, self._is_doubted = None, False
        return None

    def _find_obstacle(self) -> str | None:
        error = _try_to_write(self._folder) if self._is_doubted else None
        if error is not None and error.errno in _REFUSED:
            return f"until user {os.geteuid()} may write to {self._folder}: {error.strerror}"
        is_full = error is not None and error.errno in _FULL
        if is_full or _count_free_bytes(self._folder) < NEEDED_BYTES:
            return f"until {NEEDED_BYTES // 2**20} MiB are free in {self._folder}"
        return None

    def _tell(self, obstacle: str) -> None:
        now = time.monotonic()
        if self._told_at is None or now - self._told_at > _LOG_SECONDS:
            self._told_at = now
            _logger.error("no job is claimed %s", obstacle)


def _count_free_bytes(folder: Path) -> float:
    """Infinity if the file system does not tell."""
    while not folder.exists():
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return float("inf")
    return found.f_bavail * found.f_frsize if found.f_blocks else float("inf")


def _try_to_write(folder: Path) -> OSError | None:
    """The error that a file of NEEDED_BYTES meets, if any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(NEEDED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None
