"""What environment variables and secret files say, as it was meant.

A value may have passed through an editor on Windows, a `.env` file, a shell or a container engine,
each of which adds something of its own.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

#: Of PostgreSQL's library, and of Weights & Biases.
_FOREIGN_SECRETS: Final = ("PGPASSWORD", "WANDB_API_KEY")
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
_RATE: Final = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour)")
_QUOTES: Final = "'\""
#: Of a file that an editor on Windows has written.
_BYTE_ORDER_MARK: Final = "\ufeff"


def tidy(value: str) -> str:
    """The value without white space and one pair of quotation marks at its ends."""
    value = value.strip().strip(_BYTE_ORDER_MARK).strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES:
        value = value[1:-1].strip()
    return value


def read_variable(name: str) -> str:
    """An environment variable as it was meant; empty if it is not set."""
    return tidy(os.environ.get(name, ""))


def check_number(text: str, *, kind: Any, example: Any) -> None:
    """Raise ValueError for a text that is no finite number, if the kind is int or float, or one of
    them or None. Bounds are not checked here."""
    kind = next((each for each in (int, float) if kind in (each, each | None)), None)
    if kind is None:
        return
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415 - `--help` needs none of it

    name = "a whole number" if kind is int else "a number"
    try:
        number = TypeAdapter(kind).validate_python(text)
    except ValidationError:
        number = math.nan
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(
            f"must be {name} without a unit, such as {1 if example is None else example:.12g}"
        )


def tidy_rate(given: str) -> str:
    """`6000/minute` for `6000 / Minute`. Raises ValueError."""
    rate = given.replace(" ", "").lower()
    if not _RATE.fullmatch(rate):
        raise ValueError("must read NUMBER/second, NUMBER/minute or NUMBER/hour, as in 6000/minute")
    return rate


def split_list(given: str) -> tuple[str, ...]:
    """The entries between commas and spaces."""
    return tuple(given.replace(",", " ").split())


def read_foreign_secrets() -> list[str]:
    """The secrets in variables of libraries that this process uses."""
    names = [*_PROXIES, *(name.upper() for name in _PROXIES)]
    passwords = (each for name in names for each in find_passwords(read_variable(name)))
    return [*filter(None, map(read_variable, _FOREIGN_SECRETS)), *passwords]


def find_passwords(url: str) -> list[str]:
    """The password in a URL, as it is written there and as it is meant."""
    try:
        password = urlsplit(url if "://" in url else f"//{url}").password
    except ValueError:
        return []
    return [password, unquote(password)] if password else []


def expand_home(path: Path) -> Path:
    """The path with the home folder in place of `~`, which no shell has replaced. Raises
    ValueError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            "begins with ~ and the name of nobody who has a home folder here"
        ) from None
