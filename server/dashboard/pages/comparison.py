"""The comparison page: criteria, curves and reconstructions of several jobs."""

from dataclasses import asdict
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from sqlmodel import Session

from server.api.dependencies import NeedsStatistics, SessionDep
from server.api.queries import ComparisonQuery
from server.api.turns import TurnRoute
from server.dashboard.curves import draw_history
from server.dashboard.rendering import render_page
from server.jobs.listing import JobFilter, find_job, read_page
from server.jobs.records import list_picture_epochs
from server.judging.comparisons import MAX_COMPARED_JOBS, ComparedJob
from server.judging.criteria import CriteriaSet, list_criteria
from server.judging.knowledge import Chance, MeasureTable, is_measured
from server.texts import make_inert

NUM_CHOICES: Final = 50

router = APIRouter(
    prefix="/ui",
    include_in_schema=False,
    dependencies=[NeedsStatistics],
    route_class=TurnRoute,
)


class PageQuery(ComparisonQuery):
    """The jobs to compare; without any, the page of jobs to choose from."""

    after: str = ""


@router.get("/compare")
def show_comparison(
    request: Request, *, query: Annotated[PageQuery, Query()], session: SessionDep
) -> Response:
    if not query.job_id and not query.options:
        return _show_choices(request, session=session, after=query.after)
    comparison = query.compare(session, has_curves=True)
    thresholds, entries = comparison.thresholds, comparison.entries
    overridden = thresholds.model_dump(exclude_defaults=True)
    if comparison.criteria_set != CriteriaSet.spec:
        overridden["criteria"] = comparison.criteria_set.value
    chosen = [("options", query.options)] if query.options else []
    chosen = chosen or [("job_id", entry.job.id) for entry in entries]
    histories = [entry.epochs for entry in entries]
    chance = Chance.of_runs(histories)
    return render_page(
        "compare.html",
        request,
        comparison=comparison,
        criteria=list_criteria(comparison.criteria_set),
        measures=MeasureTable.of_runs(histories),
        chance=chance,
        is_measured=any(map(is_measured, histories)),
        is_live=any(not job.status.is_terminal for job in comparison.jobs),
        export_query=urlencode([*chosen, *overridden.items()]),
        drawing={
            "jobs": [_draw(entry, num_jobs=len(entries)) for entry in entries],
            "background_shares": comparison.background_shares,
            "chance": asdict(chance),
            "thresholds": thresholds.model_dump(),
            "criteria": list_criteria(comparison.criteria_set),
        },
        pictures=list_picture_epochs(session, [entry.job.id for entry in entries]),
    )


def _show_choices(request: Request, *, session: Session, after: str) -> Response:
    """The page to choose jobs from: the newest, or those older than the job `after`."""
    last = find_job(session, after) if after else None
    page = read_page(session, JobFilter(), after=last, limit=NUM_CHOICES + 1)
    jobs, has_more = page[:NUM_CHOICES], len(page) > NUM_CHOICES
    return render_page(
        "choose.html",
        request,
        jobs=jobs,
        next_after=jobs[-1].id if has_more else None,
        is_first_page=not after,
        max_jobs=MAX_COMPARED_JOBS,
    )


def _draw(entry: ComparedJob, *, num_jobs: int) -> dict[str, Any]:
    curves = draw_history(entry.epochs, num_jobs=num_jobs)
    return {"id": entry.job.id, "label": make_inert(entry.label), "curves": curves}
