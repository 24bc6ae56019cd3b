"""Routes for comparisons: verdicts side by side, as JSON, as a picture and as reports."""

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from server.api.dependencies import NeedsStatistics, SessionDep, SettingsDep
from server.api.problems import PROBLEM_RESPONSES
from server.api.queries import ComparisonQuery
from server.api.schemas import ComparisonPublic
from server.api.turns import TurnRoute
from server.judging.charts import render_curves
from server.judging.comparisons import Comparison
from server.judging.reports import read_picture, render_html, render_markdown

#: The report embeds its styles and pictures and has no script.
_REPORT_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"

router = APIRouter(
    prefix="/comparisons",
    tags=["comparisons"],
    responses=PROBLEM_RESPONSES,
    dependencies=[NeedsStatistics],
    route_class=TurnRoute,
)


def get_comparison(
    query: Annotated[ComparisonQuery, Query()], *, session: SessionDep
) -> Comparison:
    return query.compare(session)


def get_drawn_comparison(
    query: Annotated[ComparisonQuery, Query()], *, session: SessionDep
) -> Comparison:
    return query.compare(session, has_curves=True)


ComparisonDep = Annotated[Comparison, Depends(get_comparison)]
DrawnComparisonDep = Annotated[Comparison, Depends(get_drawn_comparison)]


@router.get("")
def read_comparison(comparison: ComparisonDep) -> ComparisonPublic:
    """Verdicts side by side, the ranking, and a recommendation or why there is none."""
    return ComparisonPublic.of(comparison)


@router.get("/curves.png", response_class=Response, responses={200: {"content": {"image/png": {}}}})
def read_curves(comparison: DrawnComparisonDep) -> Response:
    """Curves of loss, accuracy and KL, one per job."""
    headers = {"X-Content-Type-Options": "nosniff"}
    return Response(render_curves(comparison), media_type="image/png", headers=headers)


@router.get("/report.html", response_class=HTMLResponse)
def read_html_report(
    comparison: DrawnComparisonDep, *, session: SessionDep, settings: SettingsDep
) -> Response:
    """A report in one HTML file that includes its pictures."""
    pictures = {
        job.id: read_picture(session, job, runs_dir=settings.runs_dir) for job in comparison.jobs
    }
    html = render_html(comparison, pictures=pictures)
    return HTMLResponse(html, headers={"Content-Security-Policy": _REPORT_POLICY})


@router.get("/report.md", response_class=PlainTextResponse)
def read_markdown_report(comparison: ComparisonDep) -> str:
    """The report as Markdown, without pictures."""
    return render_markdown(comparison)
