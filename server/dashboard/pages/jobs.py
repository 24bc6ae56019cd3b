"""The first page: all jobs, the workers, and the form for a new job."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlmodel import Session

from server.api.dependencies import (
    AdmissionDep,
    EngineDep,
    SessionDep,
    SettingsDep,
    WorkerWatchDep,
)
from server.api.queries import MAX_PAGE_SIZE
from server.api.schemas import JobPublic, WorkerPublic
from server.dashboard.job_form import OVERRIDES, JobForm, fill_form
from server.dashboard.pages.job import list_actions
from server.dashboard.pages.login import FormDep
from server.dashboard.rendering import render_page
from server.database.engine import write_transaction
from server.files.npz import DatasetError
from server.jobs.listing import JobFilter, count_by_status, find_job, read_page
from server.jobs.options import Option, is_known, read_options
from server.jobs.submission import submit_job
from server.jobs.workers import list_workers
from server.judging.comparisons import MAX_COMPARED_JOBS
from server.judging.verdicts import VerdictCache
from server.models.tables import Job, JobStatus, WorkerState

PAGE_SIZE: Final = 25

router = APIRouter(include_in_schema=False)


def get_verdict_cache(request: Request) -> VerdictCache:
    cache: VerdictCache = request.app.state.verdict_cache
    return cache


VerdictCacheDep = Annotated[VerdictCache, Depends(get_verdict_cache)]


@router.get("/")
def show_jobs(
    request: Request,
    *,
    session: SessionDep,
    settings: SettingsDep,
    verdict_cache: VerdictCacheDep,
    watch: WorkerWatchDep,
    status: Annotated[str, Query()] = "",
    option: Annotated[str, Query()] = "",
    after: str | None = None,
) -> Response:
    # A form sends an empty choice as an empty text.
    chosen = [JobStatus(status)] if status in set(JobStatus) else []
    option = option if is_known(session, option) else ""
    options = read_options(session)
    last = find_job(session, after) if after else None
    wanted = JobFilter(statuses=chosen, option=option or None)
    page = read_page(session, wanted, after=last, limit=PAGE_SIZE + 1)
    jobs, has_more = page[:PAGE_SIZE], len(page) > PAGE_SIZE
    workers = list_workers(session, settings=settings, limit=MAX_PAGE_SIZE, watch=watch)
    return render_page(
        "jobs.html",
        request,
        rows=_add_verdicts(session, jobs, verdict_cache=verdict_cache),
        counts=count_by_status(session),
        workers=[WorkerPublic.of(w) for w in workers if w.state != WorkerState.stopped],
        next_after=jobs[-1].id if has_more else None,
        is_first_page=not after,
        max_jobs=MAX_COMPARED_JOBS,
        status=chosen[0] if chosen else "",
        option=option,
        # That of a deleted option can still be chosen by its address.
        known_options=dict.fromkeys([*options, *filter(None, [option])]),
        **_describe_form(fill_form({}, options=options), options=options),
    )


@router.get("/ui/jobs/new")
def show_form(request: Request, *, session: SessionDep) -> Response:
    """The form with the configuration of the resulting job."""
    options = read_options(session)
    form = fill_form(request.query_params, options=options)
    return render_page("new_job.html", request, **_describe_form(form, options=options))


@router.post("/ui/jobs")
def post_job(
    request: Request,
    *,
    sent: FormDep,
    engine: EngineDep,
    settings: SettingsDep,
    admission: AdmissionDep,
) -> Response:
    with Session(engine) as session:
        options = read_options(session)
    form = fill_form(sent, options=options)
    if form.request is not None and not form.errors:
        try:
            with Session(engine) as session:
                job = form.request.make_job(session, datasets_dir=settings.datasets_dir)
            with write_transaction(engine) as session:
                submit_job(session, job, admission=admission)
            return RedirectResponse(f"/ui/jobs/{job.id}", status_code=303)
        except DatasetError as error:
            form.errors["dataset"] = str(error)
    return render_page(
        "new_job.html", request, status_code=422, **_describe_form(form, options=options)
    )


def _add_verdicts(
    session: Session, jobs: Sequence[Job], *, verdict_cache: VerdictCache
) -> list[dict[str, Any]]:
    verdicts = verdict_cache.judge_all(session, jobs)
    return [
        {"job": JobPublic.of(job), "verdict": verdicts[job.id], "actions": list_actions(job)}
        for job in jobs
    ]


def _describe_form(form: JobForm, *, options: Mapping[str, Option]) -> dict[str, Any]:
    choices = [(name, option.summary) for name, option in options.items()]
    return {"form": form, "overrides": OVERRIDES, "options": choices}
