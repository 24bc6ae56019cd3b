"""The address on which a server listens, or why it cannot."""

import errno
import logging
import socket
from typing import TYPE_CHECKING

from server.environment.access import describe_user
from server.errors import LosslabError
from server.texts import list_some
from server.tokens import MIN_LENGTH_ON_NETWORK

if TYPE_CHECKING:
    from server.settings import Settings


_logger = logging.getLogger(__name__)


class StartError(LosslabError):
    """A process could not be started, or ended unexpectedly."""


def open_listener(settings: "Settings") -> socket.socket:
    """The socket on which the server listens. Raises StartError."""
    host, port = settings.host, settings.port
    if not settings.is_guarded:
        raise StartError(
            f"refusing to listen on {settings.published_host or host}: without a token, anyone who "
            "can reach it could use the service; set LOSSLAB_API_TOKEN, or use --host 127.0.0.1"
        )
    if settings.has_short_token and settings.is_served_to_others:
        raise StartError(
            f"refusing to listen on {settings.published_host or host}: LOSSLAB_API_TOKEN has fewer "
            f"than {MIN_LENGTH_ON_NETWORK} characters, and anyone who can reach the service, also "
            "through a proxy (LOSSLAB_TRUSTED_PROXIES), could guess it; `losslab token NAME` makes "
            "one"
        )
    if settings.has_short_token and settings.public_names:
        _logger.warning(
            "LOSSLAB_API_TOKEN has fewer than %d characters: if a proxy serves others as %s "
            "(LOSSLAB_ALLOWED_HOSTS), they can guess it; `losslab token NAME` makes a longer one",
            MIN_LENGTH_ON_NETWORK,
            list_some(settings.public_names, limit=3),
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = _explain_bind_error(error)
        raise StartError(f"cannot listen on {host} port {port}: {reason}") from None
    # asyncio sets this only for sockets that it has bound itself. Without it, an answer's body
    # waits until the client has acknowledged the headers, with most clients for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _explain_bind_error(error: OSError) -> str:
    match error:
        case OSError(errno=int(number)) if number < 0:  # of the resolver
            return "no machine has this name; set LOSSLAB_HOST or --host to 127.0.0.1"
        case OSError(errno=errno.EACCES | errno.EPERM):
            return (
                f"{describe_user()} may not use a port below 1024; choose another one with --port, "
                "or let a reverse proxy listen there"
            )
        case OSError(errno=errno.EADDRNOTAVAIL):
            return "this machine has no such address; set LOSSLAB_HOST or --host to one that it has"
        case OSError(errno=errno.EADDRINUSE):
            return "another process uses it; stop that, or choose another port with --port"
        case _:
            reason = (error.strerror or str(error)).partition(" (while")[0].lower()
            return f"{reason}; choose others with --host and --port"
