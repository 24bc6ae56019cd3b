"""Addresses of this service as clients see them, below the path of a reverse proxy.

Inside, all paths are those of the routes. `PathPrefix` takes the prefix off what is asked;
`locate` puts it on every address that an answer has.
"""

import re
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: How the paths of our own routes begin.
FIRST_PARTS: Final = frozenset({
    "comparisons", "datasets", "docs", "healthz", "jobs", "metrics", "openapi.json", "options",
    "readyz", "static", "studies", "ui", "workers",
})  # fmt: skip
_FORWARDED: Final = "X-Forwarded-Prefix"
#: No `//` and no `..`, which could lead to another place.
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9_~@%+:-][A-Za-z0-9._~@%+:-]{0,99}){1,20}")

_prefix: ContextVar[str] = ContextVar("prefix", default="")


def locate(path: str) -> str:
    """The address of one of our paths, for the client whose request is answered."""
    return _prefix.get() + path


def locate_base(request: Request) -> str:
    """The whole address of the service, with a slash at its end."""
    return str(request.base_url.replace(path=locate("/")))


class PathPrefix:
    """Serves the application below a path: that of the settings, or what the proxy says.

    The proxy may take the path off or leave it; it must take off one that begins like a route of
    ours, such as `/jobs`. It is believed without a check of who it is, as its `Host` is: another
    prefix leads nowhere but to other paths of the same host.
    """

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        prefix = self._prefix or _read_forwarded(Headers(scope=scope))
        _prefix.set(prefix)
        base = str(URL(scope=scope).replace(path="", query=""))
        # A proxy with one slash too many in its configuration asks for //jobs.
        path = f"/{scope['path'].lstrip('/')}"
        # Where a route of ours begins like the prefix, only the proxy can know what was meant.
        is_clear = prefix != "" and prefix.split("/")[1] not in FIRST_PARTS
        scope["path"] = _strip(path, prefix=prefix) if is_clear else path

        async def send_located(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if location := headers.get("Location"):
                    headers["Location"] = _relocate(location, base=base)
            await send(message)

        await self._app(scope, receive, send_located)


def _read_forwarded(headers: Headers) -> str:
    """What the outermost proxy says; empty if it is no path."""
    given = headers.get(_FORWARDED, "").partition(",")[0].strip().rstrip("/")
    return given if _PREFIX.fullmatch(given) else ""


def _strip(path: str, *, prefix: str) -> str:
    if path != prefix and not path.startswith(f"{prefix}/"):
        return path
    return f"/{path.removeprefix(prefix).lstrip('/')}"


def _relocate(location: str, *, base: str) -> str:
    """A target on this service below the prefix, without the host, which a proxy may not know."""
    path = location.removeprefix(base)
    return locate(path) if path.startswith("/") and not path.startswith("//") else location
