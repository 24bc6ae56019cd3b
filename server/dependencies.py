"""What routes ask for: settings, engine, a session, the job that the path names."""

import hashlib
import re
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any, Final, NoReturn

from fastapi import Depends, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.artifacts import JobFiles
from server.event_feed import EventFeed
from server.models import EpochMetrics, Job
from server.schemas import Labels
from server.settings import Settings

#: Fewer than the connections of the pool (15): a request that writes takes another one.
NUM_SESSIONS: Final = 8
_LABELS: Final = TypeAdapter(Labels)
_LABEL_PARAMETER: Final = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def get_engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def get_event_feed(request: Request) -> EventFeed:
    feed: EventFeed = request.app.state.event_feed
    return feed


SettingsDep = Annotated[Settings, Depends(get_settings)]
EngineDep = Annotated[Engine, Depends(get_engine)]
EventFeedDep = Annotated[EventFeed, Depends(get_event_feed)]


async def get_session(request: Request, engine: EngineDep) -> AsyncIterator[Session]:
    """A session for reading; changes go through `server.job_queue`.

    A session keeps its connection from one thread of a request to the next. Were there more of
    them than connections, the threads that wait for one would keep out those that give one back.
    """
    async with request.app.state.session_turns:
        session = Session(engine)
        try:
            yield session
        finally:
            await run_in_threadpool(session.close)


# Closed before the answer is sent, so that a slow reader or a stream holds no transaction.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


def get_job(job_id: str, session: SessionDep) -> Job:
    job = find_job(session, job_id)
    # Its connection goes back: a request that waits for a second one while it holds a first
    # would, in numbers, wait for ever.
    session.expunge(job)
    session.rollback()
    return job


def find_job(session: Session, job_id: str) -> Job:
    """Raises HTTPException 404."""
    return find_jobs(session, [job_id])[0]


def find_jobs(session: Session, job_ids: Iterable[str]) -> list[Job]:
    """Each job once, in the order of the ids. Raises HTTPException 404."""
    wanted = dict.fromkeys(job_ids)
    if not wanted:
        return []
    # PostgreSQL takes no NUL in a text; no job has one in its id either.
    rows = select(Job).where(col(Job.id).in_([job_id for job_id in wanted if job_id.isalnum()]))
    jobs = {job.id: job for job in session.exec(rows)}
    for job_id in wanted:
        if job_id not in jobs:
            raise HTTPException(404, f"there is no job {job_id!r}; GET /jobs lists those there are")
    return [jobs[job_id] for job_id in wanted]


JobDep = Annotated[Job, Depends(get_job)]


def get_job_files(job: JobDep, settings: SettingsDep) -> JobFiles:
    return JobFiles(settings.runs_dir, job.id)


JobFilesDep = Annotated[JobFiles, Depends(get_job_files)]


def get_labels(request: Request) -> dict[str, str]:
    """The labels to filter by. FastAPI itself reads no deep object from a query."""
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name != "metadata" and not name.startswith("metadata["):
            continue
        match = _LABEL_PARAMETER.fullmatch(name)
        if match is None or match[1] in labels:
            refuse_query(name, "give a label once, as metadata[key]=value")
        labels[match[1]] = value
    try:
        return _LABELS.validate_python(labels)
    except ValidationError as error:
        errors = [each | {"loc": ("query", "metadata", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(errors) from None


LabelsDep = Annotated[dict[str, str], Depends(get_labels)]

#: What `get_labels` reads, for the API's description.
LABELS_PARAMETER: Final[dict[str, Any]] = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "labels that the jobs have, as `metadata[study]=x`; all of them, if several",
    "schema": _LABELS.json_schema(),
}


def refuse_unknown_parameters(request: Request) -> None:
    """A filter that is misspelt would otherwise be none at all."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known and name != "metadata" and not name.startswith("metadata["):
            allowed = ", ".join([*sorted(known), "metadata[key]"])
            refuse_query(name, f"unknown parameter; there are {allowed}")


def refuse_query(name: str, message: str) -> NoReturn:
    """Answer 422 for a query parameter."""
    error: dict[str, Any] = {"type": "value_error", "loc": ("query", name), "msg": message}
    raise RequestValidationError([error])


def get_token_name(request: Request) -> str:
    """Whose token the request carries; empty where none is needed."""
    return str(getattr(request.state, "token_name", ""))


TokenNameDep = Annotated[str, Depends(get_token_name)]


#: For the description of what `is_known` may answer.
NOT_MODIFIED: Final[dict[str, Any]] = {"description": "What `If-None-Match` names is still right"}


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has what the tag stands for (RFC 9110, 13.1.2: a weak comparison)."""
    known = (
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("If-None-Match", "").split(",")
    )
    return not {etag.removeprefix("W/"), "*"}.isdisjoint(known)


def answer_tagged(request: Request, body: BaseModel) -> Response:
    """The body with a tag of its contents, or 304 if the client has it."""
    content = body.model_dump_json().encode()
    headers = {
        "ETag": f'W/"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
    }
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/json", headers=headers)


def read_epochs(session: Session, job_ids: list[str]) -> dict[str, list[EpochMetrics]]:
    """The epochs of several jobs, oldest first, in one query."""
    epochs: dict[str, list[EpochMetrics]] = {job_id: [] for job_id in job_ids}
    rows = select(EpochMetrics).where(col(EpochMetrics.job_id).in_(job_ids))
    # In the order of the primary key, so that nothing is to be sorted.
    for row in session.exec(rows.order_by(col(EpochMetrics.job_id), col(EpochMetrics.epoch))):
        epochs[row.job_id].append(row)
    return epochs
