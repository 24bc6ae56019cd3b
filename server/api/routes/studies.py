"""Routes for studies: arms times seeds, judged as groups."""

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Query, Response
from pydantic import Field, ValidationError, model_validator
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.dependencies import (
    AdmissionDep,
    EngineDep,
    NeedsStatistics,
    ResultCacheDep,
    SessionDep,
    SettingsDep,
    TokenNameDep,
    WorkerWatchDep,
)
from server.api.idempotency import (
    Answer,
    IdempotencyKeyHeader,
    KeyedRequest,
    answer_once,
    find_replay,
)
from server.api.problems import PROBLEM_RESPONSES
from server.api.queries import MAX_PAGE_SIZE, refuse_query, refuse_unknown_parameters
from server.api.study_requests import SeedsRequest, StudyRequest, check_datasets
from server.api.study_schemas import (
    DeletedStudy,
    PlannedArm,
    StudyList,
    StudyPlan,
    StudyPublic,
    StudySummary,
)
from server.api.turns import TakesTurnToJudge
from server.database.engine import write_transaction
from server.files.artifacts import JobFiles
from server.jobs import seeds, studies
from server.jobs.admission import Admission
from server.jobs.ages import AgeWatch
from server.jobs.estimates import estimate_seconds
from server.jobs.workers import count_live
from server.judging.criteria import CriteriaSet, Thresholds, read_thresholds
from server.judging.statistics import plan_looks
from server.judging.studies import ResultCache, judge_study
from server.models.studies import Study
from server.races import check_rules
from server.settings import Settings

router = APIRouter(
    prefix="/studies", tags=["studies"], responses=PROBLEM_RESPONSES, dependencies=[NeedsStatistics]
)


def get_study(study_id: str, session: SessionDep) -> Study:
    study = studies.find_study(session, study_id)
    # Return the connection, as for a job: a request that changes the study needs another one.
    session.expunge(study)
    session.rollback()
    return study


class StudyQuery(Thresholds):
    """How to judge a study otherwise than by its own criteria and thresholds. What thresholds must
    be together is checked by `override`, with those of the study that they leave as they are."""

    criteria: CriteriaSet | None = Field(
        default=None, description="the set of criteria to judge by; the study's own if left out"
    )

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        return self

    @property
    def sent(self) -> dict[str, Any]:
        """What the query says, without what it leaves out."""
        return self.model_dump(mode="json", exclude_unset=True, exclude_none=True)

    def override(self, study: Study) -> Thresholds:
        """The study's thresholds with those of the query in their place.

        Raises RequestValidationError.
        """
        sent = self.model_dump(include=self.model_fields_set - {"criteria"})
        own = read_thresholds(study.thresholds).model_dump()
        try:
            return Thresholds.model_validate({**own, **sent})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            name, other = sorted(
                ("min_accuracy", "max_accuracy"), key=lambda name: name not in sent
            )
            if other not in sent:
                reason += f"; the study's own {other} is {own[other]:g}"
            refuse_query(name, reason)


StudyDep = Annotated[Study, Depends(get_study)]
StudyQueryDep = Annotated[StudyQuery, Query()]


@router.post(
    "",
    status_code=201,
    response_model=StudyPublic,
    dependencies=[Depends(refuse_unknown_parameters)],
    responses={200: {"description": "With `dry_run`: nothing is stored", "model": StudyPlan}},
)
def create_study(
    request: StudyRequest,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    cache: ResultCacheDep,
    watch: WorkerWatchDep,
    token_name: TokenNameDep,
    admission: AdmissionDep,
    dry_run: bool = False,
    idempotency_key: IdempotencyKeyHeader = None,
) -> Response:
    """Queue the jobs of a study, all or none. They are committed before the answer.

    With `dry_run=true` the answer lists the arms, the number of jobs and the estimated seconds.
    With `Idempotency-Key`, the same request within a day gets the same answer.
    """
    keyed = KeyedRequest.of(idempotency_key, token_name=token_name, request=request)
    if not dry_run and (answer := find_replay(engine, keyed)):
        return answer
    with Session(engine) as session:
        study = request.make_study(session, datasets_dir=settings.datasets_dir)
        if dry_run:
            plan = plan_study(session, request, study, settings=settings, watch=watch)
            return Response(plan.model_dump_json(), media_type="application/json")

    def submit(session: Session) -> Answer:
        seeds.submit_study(session, study, seeds=request.list_seeds(), admission=admission)
        body = describe_study(session, study, cache=cache).model_dump_json()
        return Answer(body, location=f"/studies/{study.id}")

    return answer_once(engine, keyed, execute=submit)


def plan_study(
    session: Session,
    request: StudyRequest,
    study: Study,
    *,
    settings: Settings,
    watch: AgeWatch,
) -> StudyPlan:
    """What the study would queue, and how long that would take."""
    arms, wanted = study.arm_list, request.list_seeds()
    num_reused = seeds.count_reusable(session, study, wanted)
    num_jobs = len(arms) * len(wanted)
    num_workers = count_live(session, lease_seconds=settings.lease_seconds, watch=watch)
    seconds = estimate_seconds(session, arms, num_workers=num_workers)
    if seconds is not None:
        seconds = round(seconds * len(wanted) * (num_jobs - num_reused) / num_jobs, 1)
    return StudyPlan(
        arms=[PlannedArm.of(arm) for arm in arms],
        seeds=wanted,
        num_jobs=num_jobs,
        max_num_jobs=len(arms) * study.max_seeds,
        num_reused=num_reused,
        looks=study.looks,
        estimated_seconds=seconds,
    )


@router.get("", dependencies=[Depends(refuse_unknown_parameters)])
def list_studies(
    session: SessionDep,
    *,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = 20,
    after: Annotated[str | None, Query(description="the last id of the page before")] = None,
) -> StudyList:
    """Newest first."""
    last = studies.find_study(session, after) if after else None
    page = studies.read_studies(session, after=last, limit=limit + 1)
    data = [StudySummary.of(entry) for entry in page[:limit]]
    return StudyList(data=data, has_more=len(page) > limit)


@router.get("/{study_id}", dependencies=[TakesTurnToJudge])
def read_study(
    study: StudyDep, *, session: SessionDep, cache: ResultCacheDep, query: StudyQueryDep
) -> StudyPublic:
    """The study with its arms judged as groups, by its own criteria and thresholds or by those of
    the query."""
    return describe_study(session, study, cache=cache, query=query)


@router.delete("/{study_id}", dependencies=[Depends(refuse_unknown_parameters)])
def delete_study(
    study: StudyDep,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    jobs: Annotated[
        Literal["delete", "keep"], Query(description="`keep` keeps the jobs of the study")
    ] = "delete",
) -> DeletedStudy:
    """Delete a study that has ended, with its jobs and their files. Jobs that another study uses
    are kept."""
    num_deleted = 0 if jobs == "keep" else _delete_jobs(engine, study.id, settings=settings)
    with write_transaction(engine) as session:
        num_kept = studies.delete_study(session, study.id)
    return DeletedStudy(id=study.id, num_jobs_deleted=num_deleted, num_jobs_kept=num_kept)


@router.post("/{study_id}/cancel")
def cancel_study(study: StudyDep, *, engine: EngineDep, cache: ResultCacheDep) -> StudyPublic:
    """Cancel all jobs of the study that have not ended; a repeated request is harmless."""
    return _change(engine, study, studies.cancel_study, cache=cache)


@router.post("/{study_id}/pause")
def pause_study(study: StudyDep, *, engine: EngineDep, cache: ResultCacheDep) -> StudyPublic:
    """Pause all jobs of the study that have not ended; a repeated request is harmless."""
    return _change(engine, study, studies.pause_study, cache=cache)


@router.post("/{study_id}/resume")
def resume_study(
    study: StudyDep,
    *,
    engine: EngineDep,
    settings: SettingsDep,
    cache: ResultCacheDep,
    admission: AdmissionDep,
) -> StudyPublic:
    """Let the paused, cancelled and lost jobs of the study go on. Judged seeds are not trained
    again, also those whose loss diverged."""
    check_datasets(study, datasets_dir=settings.datasets_dir)

    def resume(session: Session, study_id: str) -> Study:
        return studies.resume_study(session, study_id, admission=admission)

    return _change(engine, study, resume, cache=cache)


@router.post("/{study_id}/seeds", response_model=StudyPublic)
def add_seeds(
    study: StudyDep,
    *,
    request: SeedsRequest,
    engine: EngineDep,
    settings: SettingsDep,
    cache: ResultCacheDep,
    token_name: TokenNameDep,
    admission: AdmissionDep,
    idempotency_key: IdempotencyKeyHeader = None,
) -> Any:
    """Queue further seeds of each arm, of a race those of each kept arm, and look again at them.
    The stated error holds for the looks that were planned.

    With `Idempotency-Key`, the same request within a day adds nothing and gets the same answer.
    """
    keyed = KeyedRequest.of(
        idempotency_key, token_name=token_name, request=request, resource=study.id
    )
    if answer := find_replay(engine, keyed, status_code=200):
        return answer
    check_datasets(study, datasets_dir=settings.datasets_dir)
    extend = _plan_seeds(engine, study, num=request.num, cache=cache, admission=admission)

    def extend_and_describe(session: Session) -> Answer:
        body = describe_study(session, extend(session, study.id), cache=cache).model_dump_json()
        return Answer(body, location=f"/studies/{study.id}")

    if keyed is None:
        return _change(engine, study, extend, cache=cache)
    return answer_once(engine, keyed, execute=extend_and_describe, status_code=200)


def _plan_seeds(
    engine: Engine, study: Study, *, num: int, cache: ResultCache, admission: Admission
) -> studies.Command:
    """A command that queues `num` seeds of the arms that are kept now. Raises StoredStudyError."""
    if study.until_decided:
        check_rules(study)
    with Session(engine) as session:
        kept = judge_study(session, study, cache=cache).kept if study.until_decided else None

    def extend(session: Session, study_id: str) -> Study:
        locked = studies.lock_study(session, study_id)
        return seeds.extend_study(
            session,
            study_id,
            num_seeds=num,
            arms=kept,
            looks=_extend_looks(locked, num_seeds=len(locked.seeds) + num),
            admission=admission,
        )

    return extend


def _change(
    engine: Engine, study: Study, change: studies.Command, *, cache: ResultCache
) -> StudyPublic:
    """Change a study and describe it, which may take seconds, after the lock is given back."""
    with write_transaction(engine) as session:
        changed = change(session, study.id)
    with Session(engine) as session:
        return describe_study(session, changed, cache=cache)


def describe_study(
    session: Session, study: Study, *, cache: ResultCache, query: StudyQuery | None = None
) -> StudyPublic:
    """A study, judged as a query asks. Raises RequestValidationError."""
    query = query or StudyQuery()
    verdict = judge_study(
        session,
        study,
        thresholds=query.override(study),
        criteria_set=query.criteria,
        cache=cache,
    )
    return StudyPublic.of(study, verdict)


def _delete_jobs(engine: Engine, study_id: str, *, settings: Settings) -> int:
    """Some in each transaction: after an interruption the study is there, and can be deleted
    again."""

    def delete_files(job_id: str) -> None:
        JobFiles(settings.runs_dir, job_id).delete()

    num_deleted = 0
    while True:
        with write_transaction(engine) as session:
            num = studies.delete_jobs(session, study_id, delete_files=delete_files)
        if num is None:
            return num_deleted
        num_deleted += num


def _extend_looks(study: Study, *, num_seeds: int) -> list[int]:
    """The looks so far, and further ones up to so many seeds."""
    last = max(study.looks, default=0)
    return [*study.looks, *(look for look in plan_looks(num_seeds) if look > last)]
