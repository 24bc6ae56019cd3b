"""What not every file system can do: links, syncs, modes, advice; and removing a file safely.

exFAT, SMB and many FUSE mounts lack some of these. Each is tried; what the file system cannot do is
reported once by each process and done without. An error of the disk, such as EIO or ENOSPC, is
raised: it is about the data.
"""

import errno
import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from server.environment.modes import file_mode

#: How a file system says that it cannot do something, or that nobody may have it done.
_UNABLE: Final = frozenset(
    {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP,
     errno.ENOTTY}
)  # fmt: skip
#: Opening or syncing a folder.
_UNABLE_FOLDER: Final = _UNABLE | {errno.EISDIR, errno.EBADF}
#: Locks of a network file system without its lock service.
_UNABLE_LOCK: Final = _UNABLE | {errno.ENOLCK, errno.EBADF}
#: Links to another device, or more of them than there may be.
_UNABLE_LINK: Final = _UNABLE | {errno.EXDEV, errno.EMLINK}

_logger = logging.getLogger(__name__)
_reported: set[str] = set()
_lock = threading.Lock()


class FileIdentity(NamedTuple):
    """Tells whether a file was changed, or replaced by another one of its name."""

    inode: int
    num_bytes: int
    modified_at_ns: int


def sync_file(path: Path, descriptor: int) -> None:
    """Put a file's content on disk."""
    _try("sync a file, so that a power failure may lose files", path, lambda: os.fsync(descriptor))


def sync_folder(folder: Path) -> None:
    """Put the names of a folder on disk: a rename is there only after that."""

    def sync() -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    step = "sync a folder, so that a power failure may lose the newest files"
    _try(step, folder, sync, unable=_UNABLE_FOLDER)


def set_mode(path: Path) -> None:
    """Let those read a file who may read all files in the data directory. A temporary file has a
    mode of its own."""
    _try("set the mode of a file", path, lambda: path.chmod(file_mode()))


def drop_from_page_cache(path: Path, descriptor: int) -> None:
    """Let the kernel drop its copy of a synced file, which is rarely read again.

    The next file is then written to the same memory. Otherwise a virtual machine may have to
    request new memory from its host, which takes longer than all other steps.
    """
    if hasattr(os, "posix_fadvise"):  # missing on macOS
        advice = os.POSIX_FADV_DONTNEED
        _try("take advice", path, lambda: os.posix_fadvise(descriptor, 0, 0, advice))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or make a copy of it."""
    if not _link(source, target):
        shutil.copyfile(source, target)


def add_file(source: Path, target: Path) -> None:
    """Give a complete file its name, which no other file may have.

    Raises FileExistsError. Where there are no links, the name is taken with an empty file, which
    is then replaced.
    """
    if not _link(source, target):
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, file_mode()))
        try:
            os.replace(source, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    sync_folder(target.parent)


def hold(path: Path, descriptor: int) -> None:
    """Mark a temporary file as being written, as long as it is open here; the mark ends with this
    process, however it ends."""

    def lock() -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    _try("lock a file", path, lock, unable=_UNABLE_LOCK)


def is_held(path: Path) -> bool | None:
    """Whether a process is writing the file; None where the file system cannot tell."""
    is_free = False

    def try_lock() -> None:
        nonlocal is_free
        with path.open("rb+") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free = True
            except BlockingIOError:
                is_free = False

    return not is_free if _try("lock a file", path, try_lock, unable=_UNABLE_LOCK) else None


def identify(path: Path) -> FileIdentity:
    """Raises FileNotFoundError."""
    status = path.stat()
    return FileIdentity(status.st_ino, status.st_size, status.st_mtime_ns)


def find_identity(path: Path) -> FileIdentity | None:
    """None if there is no such file."""
    try:
        return identify(path)
    except FileNotFoundError:
        return None


def remove_if_unchanged(path: Path, identity: FileIdentity) -> bool:
    """Remove a file unless another one has taken its name; returns whether it was removed.

    A process that was frozen before this call, or in it, removes nothing that others have written
    since: the file is moved away first, and moved back if it is not the one that was meant.
    """
    aside = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        if identify(path) != identity:
            return False
        path.rename(aside)
    except FileNotFoundError:
        return False
    if identify(aside) != identity:
        if not path.exists():
            aside.rename(path)
        return False
    aside.unlink()
    return True


def _link(source: Path, target: Path) -> bool:
    step = "link a file to a second name; it is copied or moved instead"
    return _try(step, target, lambda: os.link(source, target), unable=_UNABLE_LINK)


def _try(
    step: str, path: Path, take: Callable[[], object], *, unable: frozenset[int] = _UNABLE
) -> bool:
    """Whether the file system could take the step. Raises errors of the disk."""
    try:
        take()
    except OSError as error:
        if error.errno not in unable:
            raise
        with _lock:
            is_new = step not in _reported
            _reported.add(step)
        if is_new:
            _logger.warning("%s: the file system cannot %s (%s)", path.parent, step, error.strerror)
        return False
    return True
