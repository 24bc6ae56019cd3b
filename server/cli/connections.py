"""What a command works with: the settings, and a client of the server.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.cli.reporting import report_errors
from server.environment.variables import find_passwords, read_foreign_secrets, read_variable
from server.messages import hide_secrets

if TYPE_CHECKING:
    from server.client import LosslabClient
    from server.settings import Settings


def read_settings(**changes: Any) -> "Settings":
    """The environment's settings, overridden by the command line's."""
    from server.settings import Settings  # noqa: PLC0415

    return _read(Settings, changes)


def read_worker_settings(**changes: Any) -> "Settings":
    """The settings of a command that serves nobody."""
    from server.settings import WorkerSettings  # noqa: PLC0415

    return _read(WorkerSettings, changes)


def read_private_settings(*, data_dir: Path | None) -> "Settings":
    """The settings of a server that only this command asks, on any free port."""
    from server.settings import PrivateSettings  # noqa: PLC0415

    return _read(PrivateSettings, {"host": "127.0.0.1", "port": 0, "data_dir": data_dir})


def _read(kind: "type[Settings]", changes: dict[str, Any]) -> "Settings":
    with report_errors():
        settings = kind(**{key: value for key, value in changes.items() if value is not None})
    hide_secrets([*settings.secrets, *read_foreign_secrets()])
    return settings


@contextmanager
def open_client() -> "Iterator[LosslabClient]":
    """A client of the server at LOSSLAB_URL, whose errors are reported."""
    url, token = read_variable("LOSSLAB_URL"), read_variable("LOSSLAB_API_TOKEN")
    hide_secrets([token, *find_passwords(url), *read_foreign_secrets()])
    with _reported_client(url, token=token or None) as client:
        yield client


@contextmanager
def open_private_client(url: str) -> "Iterator[LosslabClient]":
    """A client of a server of this command's own, which needs no token."""
    with _reported_client(url, token=None) as client:
        yield client


@contextmanager
def _reported_client(url: str, *, token: str | None) -> "Iterator[LosslabClient]":
    from server.client import DEFAULT_URL, LosslabClient  # noqa: PLC0415

    with report_errors(), LosslabClient(url or DEFAULT_URL, token=token) as client:
        yield client
