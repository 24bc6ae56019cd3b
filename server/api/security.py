"""Authentication and host checks.

A request needs a valid token and an allowed host name, and must not come from another site's page.
Browsers send the token in a cookie, which the login page sets.
"""

import base64
import binascii
import re
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.origins import Sender, describe_mismatch, find_sender
from server.api.problems import SAFE_METHODS, Presentation, find_presentation, respond
from server.environment.hosts import LOOPBACK_NAMES, is_allowed
from server.tokens import ApiToken, TokenScope, find_token

TOKEN_COOKIE: Final = "losslab_token"
#: For frequent health checks; needs no token and accepts any host name.
HEALTH_PATH: Final = "/healthz"
#: Sent with every answer; a route that serves a page sets its own policy.
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
#: Stricter than a URL parser, which would read a host followed by a path as that host.
_HOST_PATTERN: Final = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{1,5})?"
)


def read_token(headers: Headers, *, method: str) -> str:
    """The token of a request (RFC 6750), or an empty text.

    Browsers send cookies automatically. For a change, the cookie therefore counts only if one of
    our own pages sent the request.
    """
    scheme, _, secret = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret
    if method not in SAFE_METHODS and find_sender(headers) is not Sender.own_page:
        return ""
    return _read_cookie(headers)


def encode_token(token: str) -> str:
    """A token in characters that are allowed in a cookie."""
    return base64.urlsafe_b64encode(token.encode()).decode("ascii")


class Authentication:
    """Passes requests without a valid token to `unauthenticated`, and answers 403 to changes with a
    read-only token. Sets `request.state.token_name`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: tuple[ApiToken, ...],
        min_secret_length: int,
        unauthenticated: ASGIApp,
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._min_secret_length = min_secret_length
        self._unauthenticated = unauthenticated

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        secret = read_token(request.headers, method=request.method)
        token = find_token(secret, self._tokens, min_length=self._min_secret_length)
        if token is None:
            await self._unauthenticated(scope, receive, send)
        elif token.scope is TokenScope.read and request.method not in SAFE_METHODS:
            detail = f"the token {token.name!r} may only read; {request.method} needs a full one"
            await respond(request, 403, detail)(scope, receive, send)
        else:
            request.state.token_name = token.name
            await self._app(scope, receive, send)


class SameOrigin:
    """Answers 421 to an unknown `Host`, and 403 to changes that another site's page requests.

    The first check prevents DNS rebinding (a site points its own name at this machine), the second
    one CSRF (a site sends forms here). Sets the security headers of every answer.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: tuple[str, ...]) -> None:
        """An empty `allowed_hosts` allows every host; for services that need a token."""
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        if refusal := self._find_refusal(request):
            await respond(request, *refusal)(scope, receive, _add_headers(send))
        else:
            await self._app(scope, receive, _add_headers(send))

    def _find_refusal(self, request: Request) -> tuple[int, str] | None:
        host = request.headers.get("Host", "")
        if host and not _HOST_PATTERN.fullmatch(host):
            return 400, f"Host is neither a name nor an address: {host[:100]!r}"
        if request.scope["path"] == HEALTH_PATH and request.method in SAFE_METHODS:
            return None
        if not is_allowed(_strip_port(host), allowed=self._allowed_hosts):
            allowed = ", ".join(dict.fromkeys([*self._allowed_hosts, *LOOPBACK_NAMES]))
            return 421, f"Host must be one of {allowed} (LOSSLAB_ALLOWED_HOSTS), not {host[:100]!r}"
        is_change = request.method not in SAFE_METHODS
        if is_change and find_sender(request.headers) is Sender.foreign_page:
            hint = describe_mismatch(request.headers)
            return 403, f"{request.method} is not allowed for pages of another site{hint}"
        return None


def find_allowed_hosts(configured: tuple[str, ...], *, is_open: bool) -> tuple[str, ...]:
    """The configured hosts. By default this machine's own names if no token is needed, else an
    empty tuple, which allows every host."""
    return configured or (LOOPBACK_NAMES if is_open else ())


def _strip_port(host: str) -> str:
    """`[::1]:8000` is `::1`."""
    match = _HOST_PATTERN.fullmatch(host)
    return match["address"] or match["name"] if match else ""


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _is_open(scope: Scope) -> bool:
    presentation: Presentation | None = scope["app"].state.presentation
    is_open_page = presentation is not None and presentation.is_open(scope["path"])
    return scope["path"] == HEALTH_PATH or is_open_page


async def ask_for_token(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 401 to a program; lead a person to the login page."""
    request = Request(scope)
    if presentation := find_presentation(request):
        answer = presentation.ask_for_token(request)
    else:
        detail = "send a token of this service as `Authorization: Bearer TOKEN`"
        answer = respond(request, 401, detail, headers={"WWW-Authenticate": "Bearer"})
    await answer(scope, receive, send)


def _read_cookie(headers: Headers) -> str:
    """The token in the cookie that the login has set, which needs no escapes (RFC 6265, 4.1.1).

    `http.cookies` takes a time that is quadratic in the length of some cookies with escapes, in the
    older versions of Python, and this is read before it is known who asks.
    """
    for pair in headers.get("Cookie", "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name == TOKEN_COOKIE:
            return _decode(value.removeprefix('"').removesuffix('"'))
    return ""


def _decode(value: str) -> str:
    try:
        return base64.b64decode(value, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
