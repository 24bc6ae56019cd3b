"""Who may read what this process writes: its own user alone, or a group as well.

An entry point that writes to the data directory sets the umask, on which the mode of a file depends
unless it is set. Where it is set, it is `file_mode`.
"""

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from server.environment.access import prepare_folder

_OF_OTHERS, _OF_GROUP_AND_OTHERS = 0o007, 0o077
#: What a group needs: to read and write, and to enter a folder, whose files all get its group.
_FOR_GROUP, _FOR_GROUP_IN_FOLDER = 0o060, 0o2070

_logger = logging.getLogger(__name__)
_is_shared = False


def keep_private(*, with_group: bool) -> None:
    """Close what this process makes from now on to other users, and open it to a group if that is
    asked for. Only entry points call this."""
    global _is_shared
    _is_shared = with_group
    os.umask(_list_forbidden())


def prepare_data_dir(path: Path, *, parts: Iterable[Path], with_group: bool) -> None:
    """Make the data directory, and close it to others with those of its parts that exist.

    Raises AccessError if they cannot be written to. Only entry points call this.
    """
    keep_private(with_group=with_group)
    known = list(parts)
    prepare_folder(path, parts=known)
    close_to_others([path, *known])


def file_mode() -> int:
    """The mode of a file in the data directory."""
    return 0o666 & ~_list_forbidden()


def close_to_others(paths: Iterable[Path]) -> None:
    """Take away the rights of others from those of the files and folders that exist. What cannot be
    closed is reported and left as it is."""
    for path in paths:
        try:
            _close(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            _logger.warning(
                "%s is open to other users of this machine, and that cannot be changed (%s)",
                path,
                error.strerror,
            )


def _close(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = mode & ~_list_forbidden()
    if _is_shared:
        wanted |= _FOR_GROUP_IN_FOLDER if path.is_dir() else _FOR_GROUP
    if wanted == mode:
        return
    if mode & stat.S_ISVTX:
        raise OSError(0, "it is a folder for the files of all users")
    path.chmod(wanted)


def _list_forbidden() -> int:
    return _OF_OTHERS if _is_shared else _OF_GROUP_AND_OTHERS
