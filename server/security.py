"""Who may ask: the bearers of tokens, by the right name, and no page of another site."""

import secrets
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.problems import respond
from server.tokens import ApiToken, TokenScope, hash_token

OPEN_PATHS: Final = ("/healthz", "/readyz")
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
#: Sent with every answer; a route that serves a page sets a policy of its own.
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")


def read_token(headers: Headers) -> str:
    """What the request carries as its bearer token (RFC 6750), or the empty string."""
    scheme, _, secret = headers.get("Authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


class Authentication:
    """Answers 401 unless the request carries a token, and 403 if that may only read.

    The token's name is `request.state.token_name` from here on.
    """

    def __init__(self, app: ASGIApp, *, tokens: tuple[ApiToken, ...]) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        token = self._find_token(read_token(request.headers))
        if token is None:
            detail = "send a token of this service as `Authorization: Bearer TOKEN`"
            answer = respond(request, 401, detail, headers={"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send)
        elif token.scope is TokenScope.read and request.method not in SAFE_METHODS:
            detail = f"the token {token.name!r} may only read; {request.method} needs a full one"
            await respond(request, 403, detail)(scope, receive, send)
        else:
            request.state.token_name = token.name
            await self._app(scope, receive, send)

    def _find_token(self, secret: str) -> ApiToken | None:
        """Takes as long for a token that is nearly right as for any other."""
        given = hash_token(secret)
        found = None
        for token in self._tokens:
            if secrets.compare_digest(given, token.sha256):
                found = token
        return found


class SameOrigin:
    """Answers 421 to a foreign `Host` and 403 to what a page of another site asks to change.

    The first stops a site whose name was pointed at this machine (DNS rebinding), the second one
    that sends forms here (CSRF). Sets the security headers of every answer.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: tuple[str, ...]) -> None:
        """No allowed hosts means any, for where a token is needed anyway."""
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
        if self._allowed_hosts and _strip_port(host) not in self._allowed_hosts:
            allowed = ", ".join(self._allowed_hosts)
            return 421, f"Host must be one of {allowed} (LOSSLAB_ALLOWED_HOSTS), not {host[:100]!r}"
        if request.method not in SAFE_METHODS and _is_cross_origin(request, host=host):
            return 403, f"{request.method} is refused to pages of another site"
        return None


def find_allowed_hosts(configured: tuple[str, ...], *, is_open: bool) -> tuple[str, ...]:
    """What is configured, or else this machine's own names where no token is needed."""
    return configured or (_LOOPBACK_NAMES if is_open else ())


def _strip_port(host: str) -> str:
    """`[::1]:8000` is `::1`; what is no host at all is itself."""
    try:
        return urlsplit(f"//{host}").hostname or host
    except ValueError:
        return host


def _is_cross_origin(request: Request, *, host: str) -> bool:
    """Browsers send these headers and pages cannot change them; other clients need neither."""
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site", "none")
    is_foreign = origin is not None and origin.partition("://")[2] != host
    return is_foreign or site not in ("same-origin", "none")


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
