"""What a command works with: the settings, and a client of the server.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from server.cli.reporting import report_errors

if TYPE_CHECKING:
    from server.client import LosslabClient
    from server.settings import Settings


def read_settings(**changes: Any) -> "Settings":
    """The environment's settings, overridden by the command line's."""
    from server.settings import Settings  # noqa: PLC0415

    with report_errors():
        return Settings(**{key: value for key, value in changes.items() if value is not None})


@contextmanager
def open_client(url: str | None = None) -> "Iterator[LosslabClient]":
    """A client of the server at `url` or LOSSLAB_URL, whose errors are reported."""
    from server.client import DEFAULT_URL, LosslabClient  # noqa: PLC0415

    url = url or os.environ.get("LOSSLAB_URL") or DEFAULT_URL
    with (
        report_errors(),
        LosslabClient(url, token=os.environ.get("LOSSLAB_API_TOKEN")) as client,
    ):
        yield client
