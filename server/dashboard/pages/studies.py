"""The list of studies, and the form for a new one."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.dependencies import (
    AdmissionDep,
    EngineDep,
    NeedsStatistics,
    ResultCacheDep,
    SessionDep,
    SettingsDep,
    WorkerWatchDep,
)
from server.api.routes.studies import plan_study
from server.api.study_requests import DEFAULT_MAX_SEEDS, DEFAULT_NUM_SEEDS
from server.api.study_schemas import StudySummary
from server.dashboard.pages.login import FieldsDep
from server.dashboard.rendering import render_page
from server.dashboard.study_decisions import DecisionCache
from server.dashboard.study_form import (
    GRID_KEYS,
    NUM_GRID_ROWS,
    StudyForm,
    fill_study_form,
)
from server.dashboard.study_view import write_sentence
from server.database.engine import write_transaction
from server.jobs import studies
from server.jobs.admission import Admission
from server.jobs.ages import AgeWatch
from server.jobs.options import read_options
from server.jobs.seeds import submit_study
from server.jobs.studies import MAX_SEEDS
from server.settings import Settings

PAGE_SIZE: Final = 25

router = APIRouter(prefix="/ui/studies", include_in_schema=False, dependencies=[NeedsStatistics])


def get_decision_cache(request: Request) -> DecisionCache:
    cache: DecisionCache = request.app.state.decision_cache
    return cache


DecisionCacheDep = Annotated[DecisionCache, Depends(get_decision_cache)]


@router.get("")
def show_studies(
    request: Request,
    *,
    session: SessionDep,
    results: ResultCacheDep,
    decisions: DecisionCacheDep,
    after: str | None = None,
) -> Response:
    last = studies.find_study(session, after) if after else None
    page = studies.read_studies(session, after=last, limit=PAGE_SIZE + 1)
    entries, has_more = page[:PAGE_SIZE], len(page) > PAGE_SIZE
    known = decisions.read(session, entries, results=results)
    rows = [(StudySummary.of(entry), known.get(entry.study.id)) for entry in entries]
    return render_page(
        "studies.html",
        request,
        rows=[
            {
                "study": study,
                "decision": decision,
                "sentence": write_sentence(decision, study.arms) if decision else None,
            }
            for study, decision in rows
        ],
        is_live=any(decision is None for _, decision in rows),
        next_after=entries[-1].study.id if has_more else None,
        is_first_page=not after,
    )


@router.get("/new")
def show_form(
    request: Request, *, session: SessionDep, settings: SettingsDep, watch: WorkerWatchDep
) -> Response:
    """The form with what the study would be."""
    sent = request.query_params.multi_items()
    form = fill_study_form(sent, session, datasets_dir=settings.datasets_dir)
    values = _describe(form, session, settings=settings, watch=watch)
    return render_page("new_study.html", request, **values)


@router.post("")
def post_study(
    request: Request,
    *,
    sent: FieldsDep,
    engine: EngineDep,
    settings: SettingsDep,
    watch: WorkerWatchDep,
    admission: AdmissionDep,
) -> Response:
    with Session(engine) as session:
        form = fill_study_form(sent, session, datasets_dir=settings.datasets_dir)
        if form.request is None or form.study is None:
            values = _describe(form, session, settings=settings, watch=watch)
            return render_page("new_study.html", request, status_code=422, **values)
    study_id = _submit(engine, form, admission=admission)
    return RedirectResponse(f"/ui/studies/{study_id}", status_code=303)


def _submit(engine: Engine, form: StudyForm, *, admission: Admission) -> str:
    """Raises QueueFullError and DatasetError."""
    assert form.request is not None and form.study is not None
    with write_transaction(engine) as session:
        wanted = form.request.list_seeds()
        study = submit_study(session, form.study, seeds=wanted, admission=admission)
        return study.id


def _describe(
    form: StudyForm, session: Session, *, settings: Settings, watch: AgeWatch
) -> dict[str, Any]:
    plan = None
    if form.request is not None and form.study is not None:
        plan = plan_study(session, form.request, form.study, settings=settings, watch=watch)
    return {
        "form": form,
        "plan": plan,
        "options": read_options(session).values(),
        "grid_keys": GRID_KEYS,
        "grid_rows": range(1, NUM_GRID_ROWS + 1),
        "num_seeds": DEFAULT_NUM_SEEDS,
        "race_seeds": DEFAULT_MAX_SEEDS,
        "max_seeds": MAX_SEEDS,
    }
