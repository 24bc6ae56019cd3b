"""Every error as RFC 9457 `application/problem+json`."""

import errno
import logging
from collections.abc import Iterable
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any, Final, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from server.api.schemas import JobRequest
from server.database.engine import OUTAGES
from server.errors import LosslabError

RETRY_AFTER_SECONDS = 5
PROBLEM_TYPE: Final = "application/problem+json"

#: Looking for a similar field takes a while, and a body may have thousands of wrong ones.
_MAX_HINTS: Final = 5
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

_logger = logging.getLogger(__name__)


class FieldError(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457; `errors` names the fields of a refused request."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldError] | None = None
    request_id: str | None = None


class Presentation(Protocol):
    """How the paths that people rather than programs ask for answer a refusal; the application
    has one as `app.state.presentation`."""

    def is_page(self, path: str) -> bool:
        """Whether people ask for this path."""

    def is_open(self, path: str) -> bool:
        """Whether this path is answered without a token."""

    def show_problem(self, request: Request, problem: Problem) -> Response:
        """The problem as a page."""

    def ask_for_token(self, request: Request) -> Response:
        """Where a person can log in."""


def find_presentation(request: Request) -> Presentation | None:
    """How to answer this request if a person sent it; None for a program."""
    presentation: Presentation = request.app.state.presentation
    return presentation if presentation.is_page(request.scope["path"]) else None


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status in (400, 401, 403, 404, 408, 409, 413, 421, 422, 429, 431, 503, 507)
}


def install_problem_handlers(app: FastAPI) -> None:
    _install_refusals(app)
    _install_failures(app)


def _install_refusals(app: FastAPI) -> None:
    """What a client can do something about."""

    @app.exception_handler(HTTPException)
    def on_http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_list_methods(request))
        return respond(request, error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(RequestValidationError)
    def on_invalid(request: Request, error: RequestValidationError) -> Response:
        known = JobRequest.model_fields if request.scope["path"] == "/jobs" else ()
        errors = explain_errors(error.errors(), num_outer=1, known_fields=known)
        return respond(request, 422, _list_errors(errors), errors=errors)

    @app.exception_handler(LosslabError)
    def on_error(request: Request, error: LosslabError) -> Response:
        if error.field is None:
            return respond(request, error.status, str(error))
        errors = [FieldError(field=error.field, message=str(error))]
        return respond(request, error.status, _list_errors(errors), errors=errors)

    @app.exception_handler(ClientDisconnect)
    def on_disconnect(request: Request, _error: ClientDisconnect) -> Response:
        return respond(request, 400, "the request's body broke off")


def _install_failures(app: FastAPI) -> None:
    """What this machine, its database or its program did."""

    @app.exception_handler(Exception)
    def on_fault(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        _logger.error("request %s failed", request_id, exc_info=error)
        detail = "an error of the server; its log has more under this request_id"
        return respond(request, 500, detail)

    def on_outage(request: Request, error: Exception) -> Response:
        _logger.warning("the database is away: %s", error)
        detail = (
            "the database does not answer, is locked or full; try again (an Idempotency-Key keeps "
            "a job from being made twice)"
        )
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        return respond(request, 503, detail, headers=headers)

    @app.exception_handler(OSError)
    def on_disk(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return on_fault(request, error)
        _logger.error("no space is left: %s", error)
        return respond(request, 507, "no space is left on the disk; nothing was kept of this")

    for outage in OUTAGES:
        app.add_exception_handler(outage, on_outage)


def explain_errors(
    errors: Iterable[Any], *, num_outer: int = 0, known_fields: Iterable[str] = ()
) -> list[FieldError]:
    """Pydantic's errors by field; `num_outer` parts of a location, like `body`, are no field.
    The first few unknown fields get a hint at one of those that are known."""
    return [
        _explain_error(
            entry, num_outer=num_outer, known_fields=known_fields if index < _MAX_HINTS else ()
        )
        for index, entry in enumerate(errors)
    ]


def respond(
    request: Request,
    status: int,
    detail: str,
    *,
    errors: list[FieldError] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """The answer that describes a problem; it carries the request's id."""
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.scope["path"],
        errors=errors,
        request_id=getattr(request.state, "request_id", None),
    )
    if presentation := find_presentation(request):
        page = presentation.show_problem(request, problem)
        page.headers.update(headers or {})
        return page
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=status,
        headers=headers,
        media_type=PROBLEM_TYPE,
    )


def _list_methods(request: Request) -> list[str]:
    """All that the path answers; the router names those of the first route that has the path."""
    scopes = [{**request.scope, "method": method} for method in _METHODS]
    return [
        scope["method"]
        for scope in scopes
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]


def _explain_error(
    error: dict[str, Any], *, num_outer: int, known_fields: Iterable[str]
) -> FieldError:
    location = error["loc"]
    if error["type"] == "json_invalid":
        message = f"no JSON: {error['ctx']['error']} (character {location[-1]})"
        return FieldError(field="body", message=message)
    message = _explain(error, known_fields=known_fields)
    return FieldError(field=_name_field(location, num_outer=num_outer), message=message)


def _name_field(location: tuple[int | str, ...], *, num_outer: int) -> str:
    """`("body", "epochs")` is `epochs`; the body as a whole is `body`."""
    names = [str(part) for part in location]
    return ".".join(names[num_outer:]) or "".join(names[:1]) or "body"


def _explain(error: dict[str, Any], *, known_fields: Iterable[str]) -> str:
    if error["type"] == "extra_forbidden":
        if error["loc"][0] == "query":
            return "unknown parameter; /docs lists those there are"
        known = list(known_fields)
        if not known:
            return "unknown field; /docs lists those there are"
        similar = get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        return f"unknown field{hint}; see GET /options for the settings there are"
    message: str = error["msg"].removeprefix("Value error, ")
    # What was sent helps, as long as it is short and can be shown.
    given = error.get("input")
    if isinstance(given, int | float | str) and len(str(given)) <= 50:
        return f"{message}, not {given!r}"
    return message


def _list_errors(errors: list[FieldError]) -> str:
    return "; ".join(f"{error.field}: {error.message}" for error in errors)
