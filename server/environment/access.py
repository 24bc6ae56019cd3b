"""Why a path cannot be used, in one line: the path, what is wrong with it, and the remedy."""

import errno
import os
import pwd
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Final

from server.errors import LosslabError

#: What is wrong, and what helps. `{user}` is who this process runs as.
_CAUSES: Final = {
    errno.EACCES: ("{user} may not use it", "change its owner or mode, or name another place"),
    errno.EPERM: ("{user} may not change it", "change its owner, or name another place"),
    errno.EROFS: ("it is on a read-only file system", "mount that writable, or name another place"),
    errno.EEXIST: ("a file is in the place of a folder", "name a folder"),
    errno.ENOTDIR: ("a file is in the place of a folder", "name a folder"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENOENT: ("it does not exist", "make it, or name another place"),
    errno.ENOSPC: ("no space is left on its disk", "free some, or name another place"),
    errno.EDQUOT: ("{user}'s disk quota is used up", "free some space, or name another place"),
    errno.ENAMETOOLONG: ("its name is too long", "name another place"),
    errno.EMFILE: ("this process has too many files open", "raise its limit (ulimit -n)"),
    errno.ENFILE: ("this machine has too many files open", "close some"),
}
#: The system refuses, and will refuse the same again; nothing was done.
REFUSALS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class AccessError(LosslabError):
    """A path cannot be used."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    @classmethod
    def of(cls, error: OSError, *, path: Path | None = None) -> "AccessError":
        return cls(explain(error, path=path))


def explain(error: OSError, *, path: Path | None = None) -> str:
    """The error in one line; `path` is for errors that name none."""
    name = error.filename if isinstance(error.filename, str | Path) else path
    reason = (error.strerror or type(error).__name__).lower()
    cause, remedy = _CAUSES.get(error.errno or 0, (reason, ""))
    line = cause.format(user=describe_user())
    return "".join([f"{name}: " if name else "", line, f"; {remedy}" if remedy else ""])


def describe_user() -> str:
    """Who this process runs as: `user anna`, or `user id 1000` in a container without names."""
    user_id = os.geteuid()
    try:
        return f"user {pwd.getpwuid(user_id).pw_name}"
    except KeyError:
        return f"user id {user_id}"


def prepare_folder(path: Path, *, parts: Iterable[Path] = ()) -> None:
    """Make a folder, and see that it and those of its parts that exist can be written to.

    Raises AccessError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AccessError.of(error, path=path) from None
    for each in (path, *parts):
        check_writable(each)


def check_writable(path: Path) -> None:
    """Raise AccessError for a file or folder that exists and that this user may not change."""
    needed = os.W_OK | (os.X_OK if path.is_dir() else 0)
    if path.exists() and not os.access(path, needed):
        is_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
        number = errno.EROFS if is_read_only else errno.EACCES
        raise AccessError.of(OSError(number, os.strerror(number), str(path)))
