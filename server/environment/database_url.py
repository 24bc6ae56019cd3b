"""The database's URL, as settings give it. No message here has any part of it."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from server.environment.variables import expand_home

#: The name of each database in a URL, whatever driver of another program stands behind it.
_NAMES: Final = {"postgres": "postgresql", "postgresql": "postgresql", "sqlite": "sqlite"}
_DRIVERS: Final = {"postgresql": "postgresql+psycopg"}
#: What SQLAlchemy takes for the user's name and password.
_USER: Final = re.compile(r"\A[^:/]*(:[^@]*)?@")
_HOST: Final = re.compile(r"[A-Za-z0-9._,-]*|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")
_PARAMETER: Final = re.compile(r"[A-Za-z_]+")
#: The parameters of a URL that are secrets.
_SECRET_PARAMETERS: Final = ("password", "sslpassword")

_FORM = "must read postgresql://USER@HOST:PORT/NAME or sqlite:///PATH, or be empty for SQLite"
_UNENCODED = (
    "cannot be read: in a user's name or a password, write @ as %40, / as %2F, : as %3A and ? as "
    "%3F, or leave the password out and set LOSSLAB_DATABASE_PASSWORD"
)


def parse_database_url(given: str) -> str:
    """The URL in its plain form, without a driver; empty stays empty. Raises ValueError."""
    if not given:
        return ""
    scheme, separator, rest = given.partition("://")
    database, _, driver = scheme.lower().partition("+")
    if not separator or database not in _NAMES:
        raise ValueError(_FORM)
    if not given.isprintable() or (database != "sqlite" and " " in given):
        raise ValueError("must not have white space inside")
    if database != "sqlite" and "@" in _USER.sub("", rest, count=1):
        raise ValueError(_UNENCODED)
    try:
        url = make_url(f"{_NAMES[database]}://{rest}")
    except (ArgumentError, ValueError):
        raise ValueError(_UNENCODED) from None
    check_characters(_list_parts(url))
    checked = _check_sqlite(url) if database == "sqlite" else _check_postgresql(url, driver=driver)
    return checked.render_as_string(hide_password=False)


def check_characters(texts: Iterable[str]) -> None:
    """Raises ValueError for a control character: PostgreSQL's library would read a text up to its
    first NUL, and connect to what the rest does not say."""
    if any(unicodedata.category(letter) == "Cc" for text in texts for letter in text):
        raise ValueError("must not have a control character, not even encoded, such as %00")


def make_sqlite_url(path: Path) -> str:
    """The URL of a file, whose path may have any letters."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def resolve_database_url(parsed: str, *, password: str) -> str:
    """A parsed URL with the driver that is installed, and the password if it has none."""
    url = make_url(parsed)
    url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
    if password and not url.password:
        url = url.set(password=password)
    return url.render_as_string(hide_password=False)


def list_secrets(url: str) -> list[str]:
    """The passwords in a URL that was parsed."""
    if not url:
        return []
    parsed = make_url(url)
    secrets = [parsed.password, *(parsed.query.get(name) for name in _SECRET_PARAMETERS)]
    return [str(secret) for secret in secrets if secret]


def _list_parts(url: URL) -> Iterator[str]:
    """All texts of a URL, decoded."""
    yield from filter(None, (url.username, url.password, url.host, url.database))
    for name, values in url.normalized_query.items():
        yield from (name, *values)


def _check_postgresql(url: URL, *, driver: str) -> URL:
    """Raises ValueError where a letter of the password was taken for the end of it."""
    database = url.database or ""
    is_split = (
        not _HOST.fullmatch(url.host or "")
        or "/" in database
        or not all(_PARAMETER.fullmatch(name) for name in url.query)
    )
    if is_split:
        raise ValueError(_UNENCODED)
    if driver == "asyncpg" and "ssl" in url.query:
        renamed = {"sslmode" if name == "ssl" else name: value for name, value in url.query.items()}
        url = url.set(query=renamed)
    return url


def _check_sqlite(url: URL) -> URL:
    """The URL with the home folder in place of `~`. Raises ValueError."""
    if url.host or url.username or url.port:
        raise ValueError("must have three slashes before the path: sqlite:///PATH")
    if not url.database or ":memory:" in url.database or url.query.get("mode") == "memory":
        raise ValueError("must name a file, which server and workers share: sqlite:///PATH")
    if url.query:
        raise ValueError(
            "takes no parameters for SQLite: end it before the question mark, and write one in a "
            "file's name as %3F"
        )
    if url.database.startswith("~"):
        url = url.set(database=str(expand_home(Path(url.database))))
    return url
