"""The first page: all jobs, the workers, and the form for a new job."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlmodel import Session

from server.api.dependencies import EngineDep, SessionDep, SettingsDep
from server.api.queries import MAX_PAGE_SIZE
from server.api.schemas import JobPublic, WorkerPublic
from server.dashboard.job_form import OVERRIDES, JobForm, fill_form, list_options
from server.dashboard.pages.job import list_actions
from server.dashboard.pages.login import FormDep
from server.dashboard.rendering import render_page
from server.database.engine import write_transaction
from server.files.datasets import DatasetError, check_dataset
from server.jobs.listing import JobFilter, count_by_status, find_job, read_page
from server.jobs.submission import submit_job
from server.jobs.workers import list_workers
from server.judging.comparisons import MAX_COMPARED_JOBS
from server.judging.verdicts import VerdictCache
from server.models.options import Option
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
    status: Annotated[str, Query()] = "",
    option: Annotated[str, Query()] = "",
    after: str | None = None,
) -> Response:
    # A form sends an empty choice as an empty text.
    chosen = [JobStatus(status)] if status in set(JobStatus) else []
    of_option = Option(option) if option in set(Option) else None
    last = find_job(session, after) if after else None
    wanted = JobFilter(statuses=chosen, option=of_option)
    page = read_page(session, wanted, after=last, limit=PAGE_SIZE + 1)
    jobs, has_more = page[:PAGE_SIZE], len(page) > PAGE_SIZE
    workers = list_workers(session, settings=settings, limit=MAX_PAGE_SIZE)
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
        option=of_option or "",
        **_describe_form(fill_form({})),
    )


@router.get("/ui/jobs/new")
def show_form(request: Request) -> Response:
    """The form with the configuration of the resulting job."""
    form = fill_form(request.query_params)
    return render_page("new_job.html", request, **_describe_form(form))


@router.post("/ui/jobs")
def post_job(
    request: Request, *, sent: FormDep, engine: EngineDep, settings: SettingsDep
) -> Response:
    form = fill_form(sent)
    if form.request is not None and not form.errors:
        try:
            job = form.request.make_job()
            check_dataset(job.config["dataset"], datasets_dir=settings.datasets_dir)
            with write_transaction(engine) as session:
                submit_job(session, job, max_queued_jobs=settings.max_queued_jobs)
            return RedirectResponse(f"/ui/jobs/{job.id}", status_code=303)
        except DatasetError as error:
            form.errors["dataset"] = str(error)
    return render_page("new_job.html", request, status_code=422, **_describe_form(form))


def _add_verdicts(
    session: Session, jobs: Sequence[Job], *, verdict_cache: VerdictCache
) -> list[dict[str, Any]]:
    verdicts = verdict_cache.judge_all(session, jobs)
    return [
        {"job": JobPublic.of(job), "verdict": verdicts[job.id], "actions": list_actions(job)}
        for job in jobs
    ]


def _describe_form(form: JobForm) -> dict[str, Any]:
    return {"form": form, "overrides": OVERRIDES, "options": list_options()}
