"""Every error answer as RFC 9457 `application/problem+json`."""

import errno
import json
import logging
from collections.abc import Iterable
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any, Final, Protocol, get_args

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DatabaseError, DataError, DBAPIError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from server.api.addresses import locate
from server.api.requests import JobRequest, OptionRequest
from server.api.study_requests import StudyRequest
from server.database.engine import OUTAGES, find_refusal
from server.environment.access import REFUSALS, explain
from server.errors import LosslabError, drop_consequences
from server.messages import redact
from server.texts import escape_controls, shorten

RETRY_AFTER_SECONDS: Final = 5
RETRY_LATER: Final = {"Retry-After": str(RETRY_AFTER_SECONDS)}
#: What helps to come again, because others then need less.
_RETRIED: Final = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
#: Methods that change nothing.
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
#: For answers to requests that change something.
MAY_BE_DONE: Final = (
    "the request may have been carried out, or may still be: look first, or send it again with the "
    "same Idempotency-Key, with which it takes effect only once"
)
_NOT_DONE: Final = (
    "the request was not carried out; send it again later (with the same Idempotency-Key it takes "
    "effect only once)"
)
PROBLEM_TYPE: Final = "application/problem+json"

#: The search for a similar field is slow, and a body may have thousands of unknown fields.
_MAX_HINTS: Final = 5
#: A refusal is a few kilobytes, however much is wrong: the first fields, and the number of others.
_MAX_ERRORS: Final = 10
_MAX_FIELD_CHARACTERS: Final = 100
_MAX_MESSAGE_CHARACTERS: Final = 500
_MAX_DETAIL_CHARACTERS: Final = 8000
_MAX_QUOTED: Final = 50
#: What FastAPI says of a body that is not even text.
_UNREADABLE: Final = "There was an error parsing the body"
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
#: The bodies with settings, by the paths of their routes; a misspelt one gets a hint.
_BODIES: Final[dict[str, type[BaseModel]]] = {
    "/jobs": JobRequest,
    "/options/{name}": OptionRequest,
    "/studies": StudyRequest,
}

_logger = logging.getLogger(__name__)


class FieldError(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457; `errors` names the invalid fields of a request."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldError] | None = None
    request_id: str | None = None


class Presentation(Protocol):
    """How errors look on the paths that people open in a browser.

    The application's is `app.state.presentation`.
    """

    def is_page(self, path: str) -> bool:
        """Whether people open this path in a browser."""

    def is_open(self, path: str) -> bool:
        """Whether this path is answered without a token."""

    def show_problem(self, request: Request, problem: Problem) -> Response:
        """The problem as a page."""

    def ask_for_token(self, request: Request) -> Response:
        """The answer that leads a person to the login page."""


def find_presentation(request: Request) -> Presentation | None:
    """The presentation if the path is one for people; None if it is one for programs."""
    presentation: Presentation | None = request.app.state.presentation
    is_for_people = presentation is not None and presentation.is_page(request.scope["path"])
    return presentation if is_for_people else None


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 421, 422, 429, 431, 503, 507)
}


def install_problem_handlers(app: FastAPI) -> None:
    app.state.presentation = None  # for programs alone, until a dashboard is installed
    _install_refusals(app)
    _install_failures(app)


def _install_refusals(app: FastAPI) -> None:
    """Handlers of errors that the client can correct."""

    @app.exception_handler(HTTPException)
    def on_http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_list_methods(request))
        detail = str(error.detail)
        if detail == _UNREADABLE:
            detail = "the body cannot be read as JSON in UTF-8"
        return respond(request, error.status_code, detail, headers=headers)

    @app.exception_handler(RequestValidationError)
    def on_invalid(request: Request, error: RequestValidationError) -> Response:
        body = _BODIES.get(request.scope["route"].path)
        found = drop_consequences(error.errors())
        errors = explain_errors(found[:_MAX_ERRORS], num_outer=1, body=body)
        num_more = len(found) - len(errors)
        more = f"; and {num_more:,} more fields are invalid" if num_more else ""
        return respond(request, 422, _list_errors(errors) + more, errors=errors)

    @app.exception_handler(LosslabError)
    def on_error(request: Request, error: LosslabError) -> Response:
        if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            # None of these is meant for a client, so it is a bug.
            raise error
        message = shorten(str(error), length=_MAX_DETAIL_CHARACTERS)
        errors = [FieldError(field=error.field, message=message)] if error.field else None
        detail = _list_errors(errors) if errors else message
        headers = RETRY_LATER if error.status in _RETRIED else None
        return respond(
            request, error.status, detail, title=error.title, errors=errors, headers=headers
        )

    @app.exception_handler(ClientDisconnect)
    def on_disconnect(request: Request, _error: ClientDisconnect) -> Response:
        return respond(request, 400, "the request's body is incomplete")


def _install_failures(app: FastAPI) -> None:
    """Handlers of errors of this machine, the database or the program."""

    @app.exception_handler(Exception)
    def on_fault(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        _logger.error("request %s failed", request_id, exc_info=error)
        detail = "an error of the server; its log has the details under this request_id"
        # The fault goes on to the log of the HTTP server, which closes the connection then.
        return respond(request, 500, detail, headers={"Connection": "close"})

    def on_outage(request: Request, error: Exception) -> Response:
        _logger.warning("the database is unavailable: %s", error)
        is_broken = isinstance(error, DBAPIError) and error.connection_invalidated
        is_begun = is_broken or request.state.commits.has_committed
        refusal = find_refusal(error) if isinstance(error, DatabaseError) else None
        if is_begun and request.method not in SAFE_METHODS:
            detail = f"the database stopped answering; {MAY_BE_DONE}"
        else:
            detail = "the database does not answer, is locked, full or read-only"
            if refusal:
                detail = f"the database file cannot be used: {refusal}"
            is_change = request.method not in SAFE_METHODS
            detail += f"; {_NOT_DONE}" if is_change else "; try again later"
        return respond(request, 503, detail, headers=RETRY_LATER)

    @app.exception_handler(OSError)
    def on_disk(request: Request, error: OSError) -> Response:
        if error.errno in REFUSALS:
            _logger.error("a file may not be written: %s", explain(error))
            detail = f"the service cannot write its files: {explain(error)}; nothing was stored"
            return respond(request, 503, detail, headers=RETRY_LATER)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return on_fault(request, error)
        _logger.error("no space is left: %s", error)
        return respond(request, 507, "no space is left on the disk; nothing was stored")

    @app.exception_handler(DataError)
    def on_unstorable(request: Request, error: DataError) -> Response:
        _logger.warning("a value was sent that the database cannot store: %s", error.orig)
        detail = f"a value has what the database cannot store, such as U+0000; {_NOT_DONE}"
        return respond(request, 422, detail)

    for outage in OUTAGES:
        app.add_exception_handler(outage, on_outage)


def explain_errors(
    errors: Iterable[Any], *, num_outer: int = 0, body: type[BaseModel] | None = None
) -> list[FieldError]:
    """Pydantic's errors, one per field.

    The first `num_outer` parts of a location, such as `body`, do not belong to the field's name.
    The first few unknown fields of a `body` with settings get a hint at a similar known one.
    """
    return [
        _explain_error(entry, num_outer=num_outer, body=body if index < _MAX_HINTS else None)
        for index, entry in enumerate(drop_consequences(errors))
    ]


def respond(
    request: Request,
    status: int,
    detail: str,
    *,
    title: str | None = None,
    errors: list[FieldError] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error answer with the request's id: a problem document, or a page for people.

    It has no secrets, whatever library the detail comes from, and is never long.
    """
    problem = Problem(
        title=title or HTTPStatus(status).phrase,
        status=status,
        detail=shorten(redact(detail), length=_MAX_DETAIL_CHARACTERS),
        instance=shorten(locate(request.scope["path"]), length=_MAX_DETAIL_CHARACTERS),
        errors=errors,
        request_id=getattr(request.state, "request_id", None),
    )
    if presentation := find_presentation(request):
        page = presentation.show_problem(request, problem)
        page.headers.update(headers or {})
        return page
    return _ProblemResponse(
        problem.model_dump(exclude_none=True), status_code=status, headers=headers
    )


class _ProblemResponse(JSONResponse):
    """A problem may quote anything that was sent: also controls, and halves of characters."""

    media_type = PROBLEM_TYPE

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return escape_controls(text).encode("utf-8", errors="backslashreplace")


def _list_methods(request: Request) -> list[str]:
    """All methods of the path; the router itself names only those of the first matching route."""
    scopes = [{**request.scope, "method": method} for method in _METHODS]
    methods = [
        scope["method"]
        for scope in scopes
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]
    return list(
        dict.fromkeys(each for m in methods for each in ([m, "HEAD"] if m == "GET" else [m]))
    )


def _explain_error(
    error: dict[str, Any], *, num_outer: int, body: type[BaseModel] | None
) -> FieldError:
    location = error["loc"]
    if error["type"] == "json_invalid":
        message = f"no JSON: {error['ctx']['error']} (character {location[-1]})"
        return FieldError(field="body", message=message)
    if tuple(location) == ("body",):
        return FieldError(field="body", message='must be a JSON object, such as {"name": "value"}')
    if error["type"] == "extra_forbidden":
        message = _explain_unknown(location, model=_find_place(body, location[num_outer:-1]))
    else:
        message = _explain(error)
    field = _name_field(location, num_outer=num_outer)
    return FieldError(
        field=shorten(field, length=_MAX_FIELD_CHARACTERS),
        message=shorten(message, length=_MAX_MESSAGE_CHARACTERS),
    )


def _name_field(location: tuple[int | str, ...], *, num_outer: int) -> str:
    """`("body", "epochs")` is `epochs`; the body as a whole is `body`."""
    names = [str(part) for part in location]
    return ".".join(names[num_outer:]) or "".join(names[:1]) or "body"


def _find_place(
    body: type[BaseModel] | None, parents: Iterable[int | str]
) -> type[BaseModel] | None:
    """The model at a place in the body; None if that is not known."""
    for parent in parents:
        if isinstance(parent, str):
            field = body.model_fields.get(parent) if body is not None else None
            body = _find_model(field.annotation) if field is not None else None
    return body


def _find_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field is, or that is in its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_find_model, get_args(annotation))), None)


def _explain_unknown(location: tuple[int | str, ...], *, model: type[BaseModel] | None) -> str:
    if location[0] == "query":
        return "unknown parameter; /docs lists the known ones"
    if model is None:
        return "unknown field; /docs lists the known ones"
    similar = _find_similar(str(location[-1]), model)
    hint = f"; did you mean {similar}?" if similar else ""
    return f"unknown field{hint}; see GET /options for the known settings"


def _find_similar(name: str, model: type[BaseModel]) -> str | None:
    """A field of nearly this name, or the setting of this name in `config`."""
    if similar := get_close_matches(name, model.model_fields, n=1):
        return similar[0]
    config = _find_place(model, ["config"])
    return f"config.{name}" if config is not None and name in config.model_fields else None


def _explain(error: dict[str, Any]) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    # Quote what was sent, beside what it must or should be, if it is short and printable.
    given = error.get("input")
    is_quoted = isinstance(given, int | float | str) and len(str(given)) <= _MAX_QUOTED
    if is_quoted and (" must " in f" {message}" or " should " in message):
        return f"{message}, not {given!r}"
    return message


def _list_errors(errors: list[FieldError]) -> str:
    return "; ".join(f"{error.field}: {error.message}" for error in errors)
