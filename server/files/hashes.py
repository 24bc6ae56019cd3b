"""SHA-256 of files, cached as long as a file does not change."""

import hashlib
from functools import lru_cache
from pathlib import Path

#: Differs between any two states of a file.
FileVersion = tuple[int, ...]


def compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_sha256(path: Path) -> str:
    """Like `compute_sha256`, but an unchanged file is not read again."""
    return _find_sha256(path, read_version(path))


def read_version(path: Path) -> FileVersion:
    # Programs can set the modification time (mtime) of a file, but not its change time (ctime).
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=4096)
def _find_sha256(path: Path, _version: FileVersion) -> str:
    return compute_sha256(path)
