"""A thin client of the HTTP API, for scripts and the command line."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Final, Literal
from urllib.parse import quote

from server.connection import (
    DEFAULT_URL,
    SETTLED_STATUSES,
    Criteria,
    Json,
    OnUpdate,
    RequestError,
    UnreachableError,
    without_none,
)
from server.study_client import StudyClient

__all__ = [
    "DEFAULT_URL",
    "SETTLED_STATUSES",
    "LosslabClient",
    "RequestError",
    "UnreachableError",
]

ReportFormat = Literal["html", "md", "curves"]

#: As long as the server allows by default.
_UPLOAD_SECONDS: Final = 300.0
_REPORT_PATHS: Final[dict[ReportFormat, str]] = {
    "html": "/comparisons/report.html",
    "md": "/comparisons/report.md",
    "curves": "/comparisons/curves.png",
}


class LosslabClient(StudyClient):
    """A connection pool to one service. Every method may raise RequestError."""

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
        return self._request_json("GET", "/jobs", params=without_none(query))

    def read_job(self, job_id: str) -> Json:
        return self._request_json("GET", _job_path(job_id))

    def cancel_job(self, job_id: str) -> Json:
        return self._request_json("POST", _job_path(job_id, "cancel"))

    def pause_job(self, job_id: str) -> Json:
        return self._request_json("POST", _job_path(job_id, "pause"))

    def resume_job(self, job_id: str, epochs: int | None = None) -> Json:
        """Continue a job. A succeeded job needs `epochs`, the new total number of epochs."""
        body = without_none({"epochs": epochs})
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
        query = without_none({"tail": tail})
        return self._request("GET", _job_path(job_id, "log"), params=query).text

    def list_reconstructions(self, job_id: str) -> Json:
        return self._request_json("GET", _job_path(job_id, "reconstructions"))

    def read_reconstruction(self, job_id: str, epoch: int | Literal["best", "latest"]) -> bytes:
        """The picture of an epoch, as PNG."""
        path = _job_path(job_id, "reconstructions", f"{epoch}.png")
        return self._request("GET", path).content

    def read_verdict(self, job_id: str, criteria: Criteria | None = None) -> Json:
        query = without_none({"criteria": criteria})
        return self._request_json("GET", _job_path(job_id, "verdict"), params=query)

    def compare(
        self,
        job_ids: Sequence[str] | None = None,
        options: Sequence[str] | None = None,
        *,
        criteria: Criteria | None = None,
    ) -> Json:
        """The comparison of these jobs, or of each option's newest succeeded job."""
        query = _comparison_query(job_ids, options, criteria)
        return self._request_json("GET", "/comparisons", params=query)

    def download_report(
        self,
        job_ids: Sequence[str] | None = None,
        options: Sequence[str] | None = None,
        *,
        criteria: Criteria | None = None,
        format: ReportFormat = "html",
    ) -> bytes:
        """A comparison as an HTML or Markdown document, or its curves as PNG."""
        query = _comparison_query(job_ids, options, criteria)
        return self._request("GET", _REPORT_PATHS[format], params=query).content

    def list_options(self) -> Json:
        """The built-in options, then the own ones, in `data`."""
        return self._request_json("GET", "/options")

    def read_option(self, name: str) -> Json:
        return self._request_json("GET", _option_path(name))

    def add_option(
        self, name: str, base: str, config: Mapping[str, Any] | None = None, summary: str = ""
    ) -> Json:
        """Add an option: a base and the settings in which it differs. The same one again is
        welcome, but an option never changes."""
        body = {"base": base, "config": dict(config or {}), "summary": summary}
        return self._request_json("PUT", _option_path(name), json=body)

    def delete_option(self, name: str) -> None:
        self._request("DELETE", _option_path(name))

    def list_datasets(self) -> Json:
        """The data sets, the built-in ones first, in `data`; other files in `left_out`."""
        return self._request_json("GET", "/datasets")

    def import_dataset(
        self,
        name: str,
        path: str | PathLike[str],
        *,
        pad: int | None = None,
        crop: int | None = None,
    ) -> Json:
        """Upload a file as a data set: an `.npz`, an `.npy`, ARC tasks as JSON or as a zip of it.

        Grids are filled up to the size `pad`, and cut to the size `crop`. Raises OSError.
        """
        query = without_none({"pad": pad, "crop": crop})
        with open(path, "rb") as file:
            return self._request_json(
                "PUT",
                f"/datasets/{quote(name, safe='')}",
                params=query,
                content=file,
                timeout=_UPLOAD_SECONDS,
            )

    def list_workers(self) -> Json:
        return self._request_json("GET", "/workers")

    def is_healthy(self) -> bool:
        """Whether a service answers at the URL. Never raises RequestError."""
        try:
            return self._request("GET", "/healthz").is_success
        except RequestError:
            return False

    def wait(
        self, job_id: str, *, poll_seconds: float = 0.5, on_update: OnUpdate | None = None
    ) -> Json:
        """Poll until the job has succeeded, failed, been cancelled or paused; returns the job.

        A restart of the service or its database is not an error.
        """
        return self._wait(
            lambda: self.read_job(job_id), poll_seconds=poll_seconds, on_update=on_update
        )


def _job_path(job_id: str, *parts: str) -> str:
    return "/".join(["/jobs", _quote(job_id), *parts])


def _option_path(name: str) -> str:
    return f"/options/{_quote(name)}"


def _quote(text: str) -> str:
    """One part of a path, whatever the text: `..` would lead to another one."""
    return quote(text, safe="").replace(".", "%2E")


def _comparison_query(
    job_ids: Sequence[str] | None, options: Sequence[str] | None, criteria: Criteria | None
) -> Json:
    return without_none(
        {
            "job_id": list(job_ids or []),
            "options": ",".join(options) if options else None,
            "criteria": criteria,
        }
    )
