"""The first page: all jobs, who works on them, and the form that posts another."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import func
from sqlmodel import Session, col, select

from server.criteria import Verdict, judge
from server.datasets import DatasetError
from server.dependencies import EngineDep, SessionDep, SettingsDep, find_job
from server.histories import read_histories
from server.job_list import JobFilter, read_page
from server.models import Job, JobStatus, Option
from server.pages.job import list_actions
from server.pages.job_form import OVERRIDES, JobForm, fill_form, list_options
from server.pages.login import FormDep
from server.pages.rendering import render_page
from server.routes.comparisons import MAX_COMPARED_JOBS
from server.routes.jobs import submit_job
from server.routes.operations import list_workers
from server.schemas import JobPublic
from server.worker_registry import WorkerState

PAGE_SIZE = 25
_MAX_KNOWN_VERDICTS = 1000

router = APIRouter(include_in_schema=False)

_known_verdicts: dict[tuple[object, ...], Verdict] = {}


@router.get("/")
def show_jobs(
    request: Request,
    *,
    session: SessionDep,
    settings: SettingsDep,
    status: Annotated[str, Query()] = "",
    option: Annotated[str, Query()] = "",
    after: str | None = None,
) -> Response:
    # An empty choice of a form is sent as an empty text.
    chosen = [JobStatus(status)] if status in set(JobStatus) else []
    of_option = Option(option) if option in set(Option) else None
    last = find_job(session, after) if after else None
    wanted = JobFilter(statuses=chosen, option=of_option)
    page = read_page(session, wanted, after=last, limit=PAGE_SIZE + 1)
    jobs, has_more = page[:PAGE_SIZE], len(page) > PAGE_SIZE
    workers = list_workers(session, settings=settings).data
    return render_page(
        "jobs.html",
        request,
        rows=_add_verdicts(session, jobs),
        counts=_count_jobs(session),
        workers=[worker for worker in workers if worker.state != WorkerState.stopped],
        next_after=jobs[-1].id if has_more else None,
        is_first_page=not after,
        max_jobs=MAX_COMPARED_JOBS,
        status=chosen[0] if chosen else "",
        option=of_option or "",
        **_describe_form(fill_form({})),
    )


@router.get("/ui/jobs/new")
def show_form(request: Request) -> Response:
    """The form with the configuration that the job would have."""
    form = fill_form(request.query_params)
    return render_page("new_job.html", request, **_describe_form(form))


@router.post("/ui/jobs")
def post_job(
    request: Request, *, sent: FormDep, engine: EngineDep, settings: SettingsDep
) -> Response:
    form = fill_form(sent)
    if form.request is not None and not form.errors:
        try:
            job = submit_job(form.request, engine=engine, settings=settings)
            return RedirectResponse(f"/ui/jobs/{job.id}", status_code=303)
        except DatasetError as error:
            form.errors["dataset"] = str(error)
    return render_page("new_job.html", request, status_code=422, **_describe_form(form))


def _judge_jobs(session: Session, jobs: Sequence[Job]) -> dict[str, Verdict]:
    """Verdicts on jobs. Those on ended ones are remembered: a list that is read again every other
    second shall not read thousands of epochs each time."""
    keys = {job.id: (job.id, job.status, job.attempt, job.epochs_completed) for job in jobs}
    known = {job_id: _known_verdicts.get(key) for job_id, key in keys.items()}
    verdicts = {job_id: verdict for job_id, verdict in known.items() if verdict is not None}
    unknown = [job for job in jobs if job.id not in verdicts]
    histories = read_histories(session, [job.id for job in unknown])
    verdicts |= {job.id: judge(job, histories[job.id]) for job in unknown}
    if len(_known_verdicts) > _MAX_KNOWN_VERDICTS:
        _known_verdicts.clear()
    ended = [job.id for job in unknown if job.status.is_terminal]
    _known_verdicts.update({keys[job_id]: verdicts[job_id] for job_id in ended})
    return verdicts


def _add_verdicts(session: Session, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    verdicts = _judge_jobs(session, jobs)
    return [
        {"job": JobPublic.of(job), "verdict": verdicts[job.id], "actions": list_actions(job)}
        for job in jobs
    ]


def _count_jobs(session: Session) -> dict[str, int]:
    counts = session.exec(select(Job.status, func.count()).group_by(col(Job.status)))
    return {str(status): count for status, count in counts}


def _describe_form(form: JobForm) -> dict[str, Any]:
    return {"form": form, "overrides": OVERRIDES, "options": list_options()}
