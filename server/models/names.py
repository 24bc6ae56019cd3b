"""Names of options and data sets: safe in a path, a file name and a table cell."""

import re
from pathlib import PureWindowsPath
from typing import Annotated, Final

from server.models.options import NAME_PATTERN
from server.patterns import Matching

_RULE: Final = (
    "a name: 1 to 64 letters from A to Z, digits, _ and -, the first one a letter or a digit"
)
#: Suffixes of files that people give in the place of a name.
_SUFFIXES: Final = re.compile(r"\.(npz|npy|json|zip)$", re.IGNORECASE)
_MAX_LENGTH: Final = 64


def is_name(text: str) -> bool:
    return re.fullmatch(NAME_PATTERN, text) is not None


def suggest_name(text: str) -> str | None:
    """The name that a path or a file name probably stands for; None if there is none."""
    # A path of Windows has either kind of slash, and so any path is one.
    last = PureWindowsPath(text[:1000]).name
    stem = _SUFFIXES.sub("", last)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:_MAX_LENGTH]
    return name if is_name(name) and name != text else None


MatchingName: Final = Matching(NAME_PATTERN, _RULE, hint=suggest_name)
EntityName = Annotated[str, MatchingName]
