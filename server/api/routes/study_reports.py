"""Routes for what a study gives to people and other programs: reports, curves and tables."""

from collections.abc import Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from sqlmodel import Session

from server.api.dependencies import (
    EngineDep,
    NeedsStatistics,
    ResultCacheDep,
    SessionDep,
    SettingsDep,
)
from server.api.problems import PROBLEM_RESPONSES
from server.api.routes.studies import StudyDep, StudyQueryDep
from server.api.turns import TurnRoute
from server.judging.histories import EpochSummary, read_histories
from server.judging.study_charts import MAX_DRAWN_EPOCHS, render_study_curves
from server.judging.study_pages import render_study_html
from server.judging.study_reports import (
    StudyReport,
    make_report,
    read_pictures,
    render_study_markdown,
)
from server.judging.tables import write_epochs, write_jobs
from server.models.studies import Study

#: The report embeds its styles and pictures and has no script.
_REPORT_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_NO_SNIFFING: Final = {"X-Content-Type-Options": "nosniff"}
_TEXT: Final = {"schema": {"type": "string"}}
_CSV: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {"text/csv": _TEXT}}}

router = APIRouter(
    prefix="/studies/{study_id}",
    tags=["studies"],
    responses=PROBLEM_RESPONSES,
    dependencies=[NeedsStatistics],
    route_class=TurnRoute,
)


def get_report(
    study: StudyDep, *, session: SessionDep, cache: ResultCacheDep, query: StudyQueryDep
) -> StudyReport:
    return make_report(
        session,
        study,
        thresholds=query.override(study),
        criteria_set=query.criteria,
        cache=cache,
    )


ReportDep = Annotated[StudyReport, Depends(get_report)]


@router.get("/report.html", response_class=HTMLResponse)
def read_study_html(report: ReportDep, *, session: SessionDep, settings: SettingsDep) -> Response:
    """A report in one HTML file that includes its pictures; the query says how to judge."""
    html = render_study_html(
        report,
        histories=_read_drawn(session, report),
        pictures=read_pictures(session, report, runs_dir=settings.runs_dir),
    )
    return HTMLResponse(html, headers={"Content-Security-Policy": _REPORT_POLICY, **_NO_SNIFFING})


@router.get("/report.md", response_class=PlainTextResponse)
def read_study_markdown(report: ReportDep) -> Response:
    """The report as Markdown, without pictures; the query says how to judge."""
    return PlainTextResponse(render_study_markdown(report), headers=_NO_SNIFFING)


@router.get("/curves.png", response_class=Response, responses={200: {"content": {"image/png": {}}}})
def read_study_curves(report: ReportDep, *, session: SessionDep) -> Response:
    """Loss, accuracy and KL of every seed with the medians, and each seed's final values."""
    png = render_study_curves(report, _read_drawn(session, report))
    return Response(png, media_type="image/png", headers=_NO_SNIFFING)


@router.get("/jobs.csv", response_class=Response, responses=_CSV)
def read_jobs_table(report: ReportDep) -> Response:
    """One row per arm and seed, as CSV; the query says how to judge."""
    rows = write_jobs(report.study, report.verdict, report.facts)
    return _send_table(report.study, "jobs", rows)


@router.get("/metrics.csv", response_class=Response, responses=_CSV)
def read_metrics_table(study: StudyDep, *, engine: EngineDep) -> Response:
    """One row per job and epoch with all metrics, as CSV."""
    return _send_table(study, "metrics", write_epochs(engine, study))


def _read_drawn(session: Session, report: StudyReport) -> dict[str, list[EpochSummary]]:
    """As many epochs of each job as the curves show."""
    return read_histories(session, report.job_ids, has_kl_curves=True, max_epochs=MAX_DRAWN_EPOCHS)


def _send_table(study: Study, name: str, rows: Iterator[str]) -> Response:
    """A table to be saved as a file, sent while it is read."""
    disposition = f'attachment; filename="losslab_study_{study.id}_{name}.csv"'
    headers = {"Content-Disposition": disposition, **_NO_SNIFFING}
    return StreamingResponse(rows, media_type="text/csv", headers=headers)
