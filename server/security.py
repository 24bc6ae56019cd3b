"""Who may ask: a bearer token on every route but those that say whether the server lives."""

import secrets
from http import HTTPStatus

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.problems import Problem

_OPEN_PATHS = ("/healthz", "/readyz")


class BearerAuthentication:
    """Answers 401 unless the request carries the token (RFC 6750)."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        else:
            await _refuse(scope["path"])(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("Authorization", "").encode()
        # Takes as long for a token that is nearly right as for any other.
        return scope["path"] in _OPEN_PATHS or secrets.compare_digest(given, self._expected)


def _refuse(path: str) -> JSONResponse:
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
