"""Who may ask: a bearer token on every route but those that say whether the server lives.

Browsers send the token in a cookie, which the login page sets.
"""

import base64
import binascii
import secrets
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.pages.rendering import is_page
from server.problems import Problem

TOKEN_COOKIE = "losslab_token"

_OPEN_PATHS = ("/healthz", "/readyz", "/ui/login")
_OPEN_PREFIX = "/static/"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class BearerAuthentication:
    """Answers 401 unless the request carries the token (RFC 6750); pages lead to the login."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._expected = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        else:
            await _refuse(scope)(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        path = scope["path"]
        given = read_token(Headers(scope=scope), method=scope["method"]).encode()
        # Takes as long for a token that is nearly right as for any other.
        is_known = secrets.compare_digest(given, self._expected)
        return is_known or path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX)


def read_token(headers: Headers, *, method: str) -> str:
    """The token that a request carries, or nothing. A cookie, which browsers send unasked, only
    counts for a change that one of our own pages asks for."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme == "Bearer":
        return token
    if method not in _SAFE_METHODS and not is_same_origin(headers):
        return ""
    return _read_cookie(headers)


def is_same_origin(headers: Headers) -> bool:
    """Whether a browser says that one of our own pages sent this; silence is no proof."""
    if site := headers.get("Sec-Fetch-Site"):
        return site == "same-origin"
    return bool(headers.get("Origin")) and urlsplit(headers["Origin"]).netloc == headers.get("Host")


def encode_token(token: str) -> str:
    """A token in the letters that a cookie may have."""
    return base64.urlsafe_b64encode(token.encode()).decode("ascii")


def _read_cookie(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("Cookie", "")).get(TOKEN_COOKIE)
        return base64.urlsafe_b64decode(cookie.value).decode() if cookie is not None else ""
    except (CookieError, binascii.Error, ValueError):
        return ""


def _refuse(scope: Scope) -> Response:
    path = scope["path"]
    if is_page(path):
        query = scope["query_string"].decode("latin-1")
        target = f"{path}?{query}" if scope["method"] == "GET" else "/"
        return RedirectResponse(f"/ui/login?next={quote(target, safe='')}", status_code=303)
    status = HTTPStatus.UNAUTHORIZED
    problem = Problem(
        title=status.phrase,
        status=status,
        detail="send the token of this service as `Authorization: Bearer TOKEN`",
        instance=path,
    )
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=status,
        headers={"WWW-Authenticate": "Bearer"},
        media_type="application/problem+json",
    )
