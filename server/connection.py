"""One connection to the HTTP API: requests, their errors, and waiting for what runs.

The methods for the routes are in `server.client` and `server.study_client`.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import httpx

from server.errors import BAD_INPUT, LosslabError

Json = dict[str, Any]
OnUpdate = Callable[[Json], None]
#: The sets of criteria by which jobs are judged.
Criteria = Literal["spec", "evidence"]

DEFAULT_URL: Final = "http://127.0.0.1:8000"
#: A job or a study with one of these statuses changes only on request.
SETTLED_STATUSES: Final = frozenset({"succeeded", "failed", "cancelled", "paused"})
RETRY_SECONDS: Final = 60.0

#: The fields of requests that have one of a few names as their value.
_CHOICE_FIELDS = ("option", "options", "base", "criteria")
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class RequestError(LosslabError):
    """The service refused a request, or did not answer (`status` 0).

    `problem` is the RFC 9457 document: title, detail, and for invalid input `errors`, a list of
    {field, message}.
    """

    def __init__(self, status: int, problem: Json) -> None:
        self.status = status
        self.problem = problem
        fields = [str(error.get("field")) for error in problem.get("errors") or []]
        if any(field.partition(".")[0] in _CHOICE_FIELDS for field in fields):
            # As for a wrong choice that the command line itself finds.
            self.exit_code = BAD_INPUT
        super().__init__(_describe(problem))


class UnreachableError(RequestError):
    """Nothing answered at the URL; the same request may succeed later."""

    def __init__(self, url: str, *, reason: str) -> None:
        detail = f"{url} did not answer ({reason}); start it with `losslab up`, or set LOSSLAB_URL"
        super().__init__(0, {"title": "No answer", "status": 0, "detail": detail})


class Connection:
    """A connection pool to one service. Every method may raise RequestError."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=timeout,
                transport=transport,
                # A proxy from the environment cannot reach this machine's loopback address.
                trust_env=httpx.URL(self.base_url).host not in _LOOPBACK_HOSTS,
            )
        except httpx.InvalidURL as error:
            raise UnreachableError(base_url, reason=str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _wait(
        self, read: Callable[[], Json], *, poll_seconds: float, on_update: OnUpdate | None
    ) -> Json:
        """Read a job or a study until it has settled.

        If the service or its database does not answer, this goes on for RETRY_SECONDS, so that a
        restart of either is not an error.
        """
        answered_at = time.monotonic()
        while True:
            try:
                answer = read()
            except RequestError as error:
                is_outage = isinstance(error, UnreachableError) or error.status == 503
                if not is_outage or time.monotonic() - answered_at > RETRY_SECONDS:
                    raise
            else:
                answered_at = time.monotonic()
                if on_update is not None:
                    on_update(answer)
                if answer["status"] in SETTLED_STATUSES:
                    return answer
            time.sleep(poll_seconds)

    def _request_json(self, method: str, path: str, **kwargs: Any) -> Json:
        response = self._request(method, path, **kwargs)
        try:
            answer: Json = response.json()
        except ValueError:
            raise RequestError(
                response.status_code,
                {"title": "Not Losslab", "detail": f"{response.url} answered something else"},
            ) from None
        return answer

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise UnreachableError(self.base_url, reason=str(error) or repr(error)) from None
        except ValueError as error:  # a NaN in the body, which JSON cannot express
            raise RequestError(0, {"title": "Invalid input", "detail": str(error)}) from None
        if not response.is_success:
            raise RequestError(response.status_code, _read_problem(response))
        return response


def _read_problem(response: httpx.Response) -> Json:
    """The problem document; for any other answer, such as a proxy's, one with its status."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict) and "title" in problem:
        return problem
    reason = response.reason_phrase or "Error"
    return {"title": reason, "detail": f"{response.url} answered {response.status_code}"}


def _describe(problem: Json) -> str:
    """One line that names every refused field."""
    line = ": ".join(str(problem[key]) for key in ("title", "detail") if problem.get(key))
    errors = problem.get("errors") or []
    fields = [f"{error.get('field')}: {error.get('message')}" for error in errors]
    # The detail may already list some fields.
    return " ".join("; ".join([line, *(f for f in fields if f not in line)]).split())


def quote_part(text: str) -> str:
    """One part of a path, whatever the text: `..` would lead to another one."""
    return quote(text, safe="").replace(".", "%2E")


def without_none(query: Mapping[str, Any]) -> Json:
    return {key: value for key, value in query.items() if value is not None}
