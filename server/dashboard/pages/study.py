"""The page of one study: its decision, its arms seed by seed, curves, pictures and actions."""

from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from sqlmodel import Session

from server.api.dependencies import (
    AdmissionDep,
    EngineDep,
    NeedsStatistics,
    ResultCacheDep,
    SessionDep,
    SettingsDep,
)
from server.api.requests import FORM
from server.api.routes import studies as routes
from server.api.routes.studies import StudyDep, StudyQueryDep
from server.api.study_requests import SeedsRequest
from server.api.study_schemas import StudyPublic
from server.api.turns import TakesTurnToJudge
from server.dashboard.drawings import draw_key, draw_seed, draw_symbols
from server.dashboard.pages.login import FormDep
from server.dashboard.rendering import render_page
from server.dashboard.study_curves import Standard, draw_strips, draw_study_curves, read_curves
from server.dashboard.study_view import (
    describe_arms,
    describe_looks,
    find_differences,
    isolate_names,
    list_actions,
    list_kinds,
    write_sentence,
)
from server.errors import InvalidInputError, NotFoundError
from server.jobs.records import list_picture_epochs
from server.jobs.studies import MAX_SEEDS
from server.judging.criteria import list_criteria
from server.judging.decisions import format_p_value
from server.judging.groups import GROUP_METRICS, RANKING_METRICS
from server.judging.studies import ArmVerdict

#: A page is loaded again every four seconds, one of many jobs less often.
_REFRESH_SECONDS = 4
_JOBS_PER_SECOND = 50

router = APIRouter(prefix="/ui/studies", include_in_schema=False, dependencies=[NeedsStatistics])


@router.get("/{study_id}", dependencies=[TakesTurnToJudge])
def show_study(
    study: StudyDep,
    *,
    request: Request,
    session: SessionDep,
    cache: ResultCacheDep,
    query: StudyQueryDep,
) -> Response:
    """The study, judged by its own criteria and thresholds or by those of the query."""
    limits = query.override(study)
    public = routes.describe_study(session, study, cache=cache, query=query)
    rows, names = describe_arms(public), [arm.arm for arm in public.arms]
    curves = read_curves(session, public.arms)
    standard = Standard(limits, list_criteria(public.criteria_set), curves.chance)
    return render_page(
        "study.html",
        request,
        study=public,
        sentence=write_sentence(public.recommendation, names),
        isolate=lambda arms: isolate_names(", ".join(arms), names),
        rows=rows,
        kinds=list_kinds(rows),
        looks=describe_looks(public),
        actions=list_actions(study, public),
        max_new_seeds=MAX_SEEDS - len(study.seeds),
        curves=draw_study_curves(curves, public.arms, standard=standard),
        is_measured=curves.is_measured,
        strips=draw_strips(public.arms, standard=standard),
        pictures=_describe_pictures(session, public.arms),
        ranking_title=GROUP_METRICS[RANKING_METRICS[public.criteria_set]].title,
        differences=find_differences(public.arms),
        judged_by=query.sent,
        export_query=f"?{urlencode(query.sent)}" if query.sent else "",
        refresh_seconds=_choose_refresh(public),
        draw_key=draw_key,
        draw_seed=draw_seed,
        symbols=draw_symbols(),
        format_p_value=format_p_value,
    )


@router.post("/{study_id}/{action}")
def change_study(
    study: StudyDep,
    *,
    action: str,
    engine: EngineDep,
    settings: SettingsDep,
    cache: ResultCacheDep,
    admission: AdmissionDep,
    form: FormDep,
) -> Response:
    """Carry out an action as the API does, then go back to the page."""
    target = f"/ui/studies/{study.id}"
    match action:
        case "cancel":
            routes.cancel_study(study, engine=engine, cache=cache)
        case "pause":
            routes.pause_study(study, engine=engine, cache=cache)
        case "resume":
            routes.resume_study(
                study, engine=engine, settings=settings, cache=cache, admission=admission
            )
        case "seeds":
            routes.add_seeds(
                study,
                request=_read_num_seeds(form),
                engine=engine,
                settings=settings,
                cache=cache,
                token_name="",  # only a key belongs to a token
                admission=admission,
            )
        case "delete":
            is_whole = form.get("jobs") == "delete"
            jobs: Literal["delete", "keep"] = "delete" if is_whole else "keep"
            routes.delete_study(study, engine=engine, settings=settings, jobs=jobs)
            target = "/ui/studies"
        case _:
            raise NotFoundError(f"a study has no action {action!r}")
    return RedirectResponse(target, status_code=303)


def _read_num_seeds(form: dict[str, str]) -> SeedsRequest:
    given = form.get("num", "").strip()
    try:
        return SeedsRequest.model_validate({"num": given}, context=FORM)
    except ValueError:
        message = f"further seeds are a whole number from 1 to {MAX_SEEDS}, not {given[:20]!r}"
        raise InvalidInputError(message) from None


def _choose_refresh(study: StudyPublic) -> int | None:
    """The seconds between two loads of an open page; None once nothing changes any more."""
    if study.status.is_terminal:
        return None
    return max(_REFRESH_SECONDS, study.num_jobs // _JOBS_PER_SECOND)


def _describe_pictures(session: Session, arms: Sequence[ArmVerdict]) -> list[dict[str, Any]]:
    """The newest picture of each arm's median run and of its worst."""
    runs = [(number, *run) for number, arm in enumerate(arms) for run in _list_runs(arm)]
    epochs = list_picture_epochs(session, sorted({job_id for *_, job_id in runs}))
    pictures: list[dict[str, Any]] = [{"arm": arm.arm, "runs": []} for arm in arms]
    for number, kind, job_id in runs:
        seed = arms[number].seeds[arms[number].jobs.index(job_id)].seed
        epoch = epochs[job_id][-1] if epochs[job_id] else None
        run = {"kind": kind, "job_id": job_id, "seed": seed, "epoch": epoch}
        pictures[number]["runs"].append(run)
    return pictures


def _list_runs(arm: ArmVerdict) -> list[tuple[str, str]]:
    """The arm's median run and its worst, if these are two."""
    if arm.median_job_id is None or arm.worst_job_id is None:
        return []
    if arm.median_job_id == arm.worst_job_id:
        return [("only run", arm.median_job_id)]
    return [("median run", arm.median_job_id), ("worst run", arm.worst_job_id)]
