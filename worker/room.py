"""Room on the disk: a worker that has none claims no job."""

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

_logger = logging.getLogger(__name__)


class Room:
    """Whether there is room for the files of another job.

    Without it each job of the queue would be claimed, fail, and lose an attempt.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_doubted = False
        self._told_at: float | None = None

    def doubt(self) -> None:
        """A job found the disk full. What the system says of free space may not count quotas, so
        that from now on it is tried."""
        self._is_doubted = True

    def is_there(self) -> bool:
        """Cheap enough to be asked before every claim."""
        if _count_free_bytes(self._folder) < NEEDED_BYTES or not self._is_tried():
            self._tell_that_it_is_missing()
            return False
        if self._told_at is not None:
            _logger.info("there is room in %s again", self._folder)
        self._told_at, self._is_doubted = None, False
        return True

    def _is_tried(self) -> bool:
        return not self._is_doubted or _can_write(self._folder)

    def _tell_that_it_is_missing(self) -> None:
        now = time.monotonic()
        if self._told_at is None or now - self._told_at > _LOG_SECONDS:
            self._told_at = now
            _logger.error(
                "no job is claimed until %d MiB are free in %s",
                NEEDED_BYTES // 2**20,
                self._folder,
            )


def _count_free_bytes(folder: Path) -> float:
    """Infinity if the file system does not tell."""
    while not folder.exists():
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return float("inf")
    return found.f_bavail * found.f_frsize if found.f_blocks else float("inf")


def _can_write(folder: Path) -> bool:
    """Whether a file of NEEDED_BYTES can be written. Other errors are not about room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(NEEDED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in _FULL
    return True
