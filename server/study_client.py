"""The methods of the client for studies."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypedDict, Unpack

from server.connection import (
    Connection,
    Criteria,
    Json,
    OnUpdate,
    quote_part,
    without_none,
)

StudyReportFormat = Literal["html", "md", "curves", "jobs", "metrics"]

_REPORT_NAMES: Final[dict[StudyReportFormat, str]] = {
    "html": "report.html",
    "md": "report.md",
    "curves": "curves.png",
    "jobs": "jobs.csv",
    "metrics": "metrics.csv",
}


class StudyFields(TypedDict, total=False):
    """What a study may have besides its options; None is the server's default."""

    num_seeds: int | None
    seeds: Sequence[int] | None
    grid: Mapping[str, Sequence[Any]] | None
    config: Json | None
    quick_test: bool
    until_decided: bool
    max_seeds: int | None
    reuse: bool
    name: str | None
    metadata: Mapping[str, str] | None
    criteria: Criteria | None
    thresholds: Mapping[str, float] | None
    priority: int


class StudyClient(Connection):
    """Requests about studies. Every method may raise RequestError."""

    def create_study(
        self,
        options: Sequence[str | Json],
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[StudyFields],
    ) -> Json:
        """Queue the jobs of a study: each option at each point of the grid, with each seed.

        An option is a name, or {"name", "base", "config"} for an arm that is no option. The same
        `idempotency_key` with the same request makes no second study.
        """
        headers = without_none({"Idempotency-Key": idempotency_key})
        body = _study_body(options, fields)
        return self._request_json("POST", "/studies", json=body, headers=headers)

    def plan_study(self, options: Sequence[str | Json], **fields: Unpack[StudyFields]) -> Json:
        """What `create_study` would queue, and the seconds that it would take; queues nothing."""
        body = _study_body(options, fields)
        return self._request_json("POST", "/studies", json=body, params={"dry_run": True})

    def list_studies(self, limit: int | None = None, after: str | None = None) -> Json:
        """The newest studies, one page: `data` and `has_more`; `after` is the page before's last
        id."""
        query = without_none({"limit": limit, "after": after})
        return self._request_json("GET", "/studies", params=query)

    def read_study(self, study_id: str, criteria: Criteria | None = None) -> Json:
        """A study with its arms, its looks and its decision; by its own criteria unless others are
        given."""
        query = without_none({"criteria": criteria})
        return self._request_json("GET", _study_path(study_id), params=query)

    def cancel_study(self, study_id: str) -> Json:
        return self._request_json("POST", _study_path(study_id, "cancel"))

    def pause_study(self, study_id: str) -> Json:
        return self._request_json("POST", _study_path(study_id, "pause"))

    def resume_study(self, study_id: str) -> Json:
        return self._request_json("POST", _study_path(study_id, "resume"))

    def add_seeds(self, study_id: str, num: int) -> Json:
        """Queue further seeds of each arm; of a race, of each arm that is kept."""
        return self._request_json("POST", _study_path(study_id, "seeds"), json={"num": num})

    def delete_study(self, study_id: str, keep_jobs: bool = False) -> Json:
        """Delete a study that has ended, and its jobs; says how many were deleted and kept."""
        query = {"jobs": "keep"} if keep_jobs else {}
        return self._request_json("DELETE", _study_path(study_id), params=query)

    def download_study_report(
        self,
        study_id: str,
        format: StudyReportFormat = "html",
        criteria: Criteria | None = None,
    ) -> bytes:
        """The study as an HTML or Markdown document, its curves as PNG, or a CSV file with one row
        for each of its jobs or of its epochs (`metrics`, which no criteria judge)."""
        query = without_none({"criteria": None if format == "metrics" else criteria})
        path = _study_path(study_id, _REPORT_NAMES[format])
        return self._request("GET", path, params=query).content

    def wait_study(
        self, study_id: str, *, poll_seconds: float = 1.0, on_update: OnUpdate | None = None
    ) -> Json:
        """Poll until the study has succeeded, failed, been cancelled or paused; returns it.

        A race goes on until it is decided or has all its seeds. A restart of the service or its
        database is not an error.
        """
        return self._wait(
            lambda: self.read_study(study_id), poll_seconds=poll_seconds, on_update=on_update
        )


def _study_body(options: Sequence[str | Json], fields: StudyFields) -> Json:
    return {"options": list(options)} | without_none(fields)


def _study_path(study_id: str, *parts: str) -> str:
    return "/".join(["/studies", quote_part(study_id), *parts])
