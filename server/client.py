"""A thin client of the HTTP API, for scripts and the command line."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import httpx

from server.errors import LosslabError

Json = dict[str, Any]
ReportFormat = Literal["html", "md", "curves"]

DEFAULT_URL: Final = "http://127.0.0.1:8000"
#: A job with one of these statuses changes only on request.
SETTLED_STATUSES: Final = frozenset({"succeeded", "failed", "cancelled", "paused"})
RETRY_SECONDS: Final = 60.0

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_REPORT_PATHS: dict[ReportFormat, str] = {
    "html": "/comparisons/report.html",
    "md": "/comparisons/report.md",
    "curves": "/comparisons/curves.png",
}


class RequestError(LosslabError):
    """The service refused a request, or did not answer (`status` 0).

    `problem` is the RFC 9457 document: title, detail, and for invalid input `errors`, a list of
    {field, message}.
    """

    def __init__(self, status: int, problem: Json) -> None:
        self.status = status
        self.problem = problem
        super().__init__(_describe(problem))


class UnreachableError(RequestError):
    """Nothing answered at the URL; the same request may succeed later."""

    def __init__(self, url: str, *, reason: str) -> None:
        detail = f"{url} did not answer ({reason}); start it with `losslab up`, or set LOSSLAB_URL"
        super().__init__(0, {"title": "No answer", "status": 0, "detail": detail})


class LosslabClient:
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

    def create_job(self, option: str, quick_test: bool = False, **overrides: Any) -> Json:
        """Queue a job. `overrides` are configuration keys, `name`, `metadata` and `priority`."""
        body = {"option": option, "quick_test": quick_test, **overrides}
        return self._request_json("POST", "/jobs", json=body)

    def list_jobs(
        self,
        status: str | None = None,
        option: str | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> Json:
        """The newest matching jobs, one page: `data` and `has_more`."""
        query = {"status": status, "option": option, "name": name, "limit": limit}
        return self._request_json("GET", "/jobs", params=_without_none(query))

    def read_job(self, job_id: str) -> Json:
        return self._request_json("GET", _job_path(job_id))

    def cancel_job(self, job_id: str) -> Json:
        return self._request_json("POST", _job_path(job_id, "cancel"))

    def pause_job(self, job_id: str) -> Json:
        return self._request_json("POST", _job_path(job_id, "pause"))

    def resume_job(self, job_id: str, epochs: int | None = None) -> Json:
        """Continue a job. A succeeded job needs `epochs`, the new total number of epochs."""
        body = _without_none({"epochs": epochs})
        return self._request_json("POST", _job_path(job_id, "resume"), json=body)

    def delete_job(self, job_id: str) -> None:
        self._request("DELETE", _job_path(job_id))

    def read_metrics(self, job_id: str) -> Json:
        """One row per epoch, oldest first, in `data`."""
        return self._request_json("GET", _job_path(job_id, "metrics"))

    def list_events(self, job_id: str, after: int = 0) -> Json:
        """The job's events after the id `after`, oldest first: `data` and `has_more`."""
        return self._request_json("GET", _job_path(job_id, "events"), params={"after": after})

    def read_log(self, job_id: str, tail: int | None = None) -> str:
        """The run's log, or its last `tail` lines."""
        query = _without_none({"tail": tail})
        return self._request("GET", _job_path(job_id, "log"), params=query).text

    def list_reconstructions(self, job_id: str) -> Json:
        return self._request_json("GET", _job_path(job_id, "reconstructions"))

    def read_reconstruction(self, job_id: str, epoch: int | Literal["best", "latest"]) -> bytes:
        """The picture of an epoch, as PNG."""
        path = _job_path(job_id, "reconstructions", f"{epoch}.png")
        return self._request("GET", path).content

    def read_verdict(self, job_id: str) -> Json:
        return self._request_json("GET", _job_path(job_id, "verdict"))

    def compare(
        self, job_ids: Sequence[str] | None = None, options: Sequence[str] | None = None
    ) -> Json:
        """The comparison of these jobs, or of each option's newest succeeded job."""
        query = _comparison_query(job_ids, options)
        return self._request_json("GET", "/comparisons", params=query)

    def download_report(
        self,
        job_ids: Sequence[str] | None = None,
        options: Sequence[str] | None = None,
        *,
        format: ReportFormat = "html",
    ) -> bytes:
        """A comparison as an HTML or Markdown document, or its curves as PNG."""
        query = _comparison_query(job_ids, options)
        return self._request("GET", _REPORT_PATHS[format], params=query).content

    def list_options(self) -> Json:
        return self._request_json("GET", "/options")

    def list_workers(self) -> Json:
        return self._request_json("GET", "/workers")

    def is_healthy(self) -> bool:
        """Whether a service answers at the URL. Never raises RequestError."""
        try:
            return self._request("GET", "/healthz").is_success
        except RequestError:
            return False

    def wait(
        self,
        job_id: str,
        *,
        poll_seconds: float = 0.5,
        on_update: Callable[[Json], None] | None = None,
    ) -> Json:
        """Poll until the job has succeeded, failed, been cancelled or paused; returns the job.

        If the service or its database does not answer, polling goes on for RETRY_SECONDS, so that
        a restart of either is not an error.
        """
        answered_at = time.monotonic()
        while True:
            try:
                job = self.read_job(job_id)
            except RequestError as error:
                is_outage = isinstance(error, UnreachableError) or error.status == 503
                if not is_outage or time.monotonic() - answered_at > RETRY_SECONDS:
                    raise
            else:
                answered_at = time.monotonic()
                if on_update is not None:
                    on_update(job)
                if job["status"] in SETTLED_STATUSES:
                    return job
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


def _job_path(job_id: str, *parts: str) -> str:
    return "/".join(["/jobs", quote(job_id, safe=""), *parts])


def _comparison_query(job_ids: Sequence[str] | None, options: Sequence[str] | None) -> Json:
    query = {"job_id": list(job_ids or []), "options": ",".join(options) if options else None}
    return _without_none(query)


def _without_none(query: Mapping[str, Any]) -> Json:
    return {key: value for key, value in query.items() if value is not None}
