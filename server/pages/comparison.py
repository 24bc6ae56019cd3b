"""Jobs side by side: curves over each other, criteria in a table, pictures in step."""

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from sqlmodel import Session, col, select

from server.dependencies import SessionDep, find_job
from server.job_list import JobFilter, read_page
from server.models import Artifact, ArtifactKind
from server.pages.curves import draw_history
from server.pages.rendering import render_page
from server.reports import ReportEntry
from server.routes.comparisons import (
    MAX_COMPARED_JOBS,
    ComparisonQuery,
    find_entries,
    make_comparison,
)

NUM_CHOICES = 50

router = APIRouter(prefix="/ui", include_in_schema=False)


class PageQuery(ComparisonQuery):
    """What to compare; as long as that is nothing, which jobs to choose from."""

    after: str = ""


@router.get("/compare")
def show_comparison(
    request: Request, *, query: Annotated[PageQuery, Query()], session: SessionDep
) -> Response:
    if not query.job_id and not query.options:
        return _offer_jobs(request, session=session, after=query.after)
    entries = find_entries(query, session=session)
    thresholds = query.thresholds()
    overridden = thresholds.model_dump(exclude_defaults=True)
    ids = [("job_id", entry.job.id) for entry in entries]
    return render_page(
        "compare.html",
        request,
        entries=entries,
        comparison=make_comparison(entries),
        is_live=any(not entry.job.status.is_terminal for entry in entries),
        export_query=urlencode([*ids, *overridden.items()]),
        drawing={
            "jobs": [_draw(entry, num_jobs=len(entries)) for entry in entries],
            "background_shares": _list_background_shares(entries),
            "thresholds": thresholds.model_dump(),
        },
        pictures=_list_pictures(session, entries),
    )


def _offer_jobs(request: Request, *, session: Session, after: str) -> Response:
    """The page to choose jobs from, those older than the job `after`."""
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


def _draw(entry: ReportEntry, *, num_jobs: int) -> dict[str, Any]:
    curves = draw_history(entry.metrics, num_jobs=num_jobs)
    return {"id": entry.job.id, "label": entry.label, "curves": curves}


def _list_background_shares(entries: Sequence[ReportEntry]) -> list[float]:
    summaries = [entry.job.dataset_summary for entry in entries if entry.job.dataset_summary]
    return sorted({round(summary["background_share"], 4) for summary in summaries})[:3]


def _list_pictures(session: Session, entries: Sequence[ReportEntry]) -> dict[str, list[int]]:
    """The epochs of which each job has a picture."""
    epochs: dict[str, list[int]] = {entry.job.id: [] for entry in entries}
    pictures = select(Artifact.job_id, Artifact.epoch).where(
        col(Artifact.job_id).in_(epochs), Artifact.kind == ArtifactKind.reconstruction
    )
    for job_id, epoch in session.exec(pictures.order_by(col(Artifact.epoch))):
        epochs[job_id].append(epoch)
    return epochs
