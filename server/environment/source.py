"""The source code that runs here: its digest, its commit, and whether it was changed."""

import base64
import hashlib
import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final, NamedTuple

_ROOT: Final = Path(__file__).parents[2]
_PACKAGES: Final = ("server", "worker")
_GIT_SECONDS: Final = 10.0


class Source(NamedTuple):
    """`revision` is a git commit; `is_changed` is None where nothing says what it was."""

    sha256: str
    revision: str | None
    is_changed: bool | None


@cache
def read_source() -> Source:
    """What was there when it was first asked for: a process runs what it imported."""
    return find_source(_ROOT)


def find_source(root: Path) -> Source:
    """Of the packages in this folder, which is a git checkout or what pip installed into."""
    files = sorted(path for name in _PACKAGES for path in (root / name).rglob("*.py"))
    revision = _ask_git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if revision:
        changes = _ask_git(root, "status", "--porcelain", "--", *_PACKAGES)
        is_changed = None if changes is None else bool(changes)
    else:
        is_changed = _differs_from_package(files)
    return Source(_compute_digest(files, root=root), revision or None, is_changed)


def _compute_digest(files: list[Path], *, root: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _ask_git(root: Path, *arguments: str) -> str | None:
    """None without git, and where git refuses: the folder may belong to another user."""
    # Variables of git would name another repository, as in a hook.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            env=clean,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return answer.stdout.strip()


def _differs_from_package(files: list[Path]) -> bool | None:
    """Whether the files are others than pip installed, by its record (PEP 376); None if it
    installed no files, but a link to a folder."""
    try:
        entries = distribution("losslab").files or []
    except PackageNotFoundError:
        return None
    recorded = {
        Path(str(entry.locate())).resolve(): entry.hash.value
        for entry in entries
        if entry.hash is not None and entry.parts[0] in _PACKAGES and entry.suffix == ".py"
    }
    if not recorded:
        return None
    return {path.resolve(): _hash(path) for path in files} != recorded


def _hash(path: Path) -> str:
    """As a record has it: base64 for URLs, without padding."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
