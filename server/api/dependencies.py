"""Dependencies of the routes: settings, engine, session, and the job in the path."""

from collections.abc import AsyncIterator
from typing import Annotated, Final

import anyio
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.event_feed import EventFeed
from server.api.rates import find_client
from server.api.turns import Turns
from server.errors import UnavailableError
from server.files.artifacts import JobFiles
from server.jobs.admission import Admission
from server.jobs.ages import AgeWatch
from server.jobs.listing import find_job
from server.judging.statistics import load_library
from server.judging.studies import ResultCache
from server.models.tables import Job
from server.settings import Settings
from server.texts import shorten, show_controls

#: Of what a program says of itself, a browser takes some 120 characters.
_MAX_CLIENT_LENGTH: Final = 200


def get_settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def find_engine(request: Request) -> Engine | None:
    """None until the database was there for the first time."""
    engine: Engine = request.app.state.engine
    return engine if request.app.state.is_open else None


def get_engine(engine: Annotated[Engine | None, Depends(find_engine)]) -> Engine:
    """Raises UnavailableError."""
    if engine is None:
        raise UnavailableError("the database is not there yet; nothing was done, try again later")
    return engine


def get_event_feed(request: Request) -> EventFeed:
    feed: EventFeed = request.app.state.event_feed
    return feed


def get_result_cache(request: Request) -> ResultCache:
    cache: ResultCache = request.app.state.result_cache
    return cache


def get_worker_watch(request: Request) -> AgeWatch:
    watch: AgeWatch = request.app.state.worker_watch
    return watch


WorkerWatchDep = Annotated[AgeWatch, Depends(get_worker_watch)]
ResultCacheDep = Annotated[ResultCache, Depends(get_result_cache)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
OpenedEngineDep = Annotated[Engine | None, Depends(find_engine)]
EngineDep = Annotated[Engine, Depends(get_engine)]
EventFeedDep = Annotated[EventFeed, Depends(get_event_feed)]


#: For routes that judge groups of jobs: the library is imported before they open a transaction.
NeedsStatistics: Final = Depends(load_library)


async def get_session(request: Request, engine: EngineDep) -> AsyncIterator[Session]:
    """A session for reading; code that changes a job opens its own transaction.

    A session keeps its connection while a request moves from thread to thread. With more sessions
    than connections, threads that wait for a connection would block those that return one.
    """
    turns: Turns = request.app.state.session_turns
    async with turns.hold(find_client(request)):
        session = Session(engine)
        try:
            yield session
        finally:
            # Also for a request that is cancelled: its connection goes back to the pool here.
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(session.close)


# Closed before the answer is sent, so that a slow client or a stream holds no transaction.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


def get_job(job_id: str, session: SessionDep) -> Job:
    job = find_job(session, job_id)
    # Return the connection: many requests that each hold one and wait for a second would deadlock.
    session.expunge(job)
    session.rollback()
    return job


JobDep = Annotated[Job, Depends(get_job)]


def get_job_files(job: JobDep, settings: SettingsDep) -> JobFiles:
    return JobFiles(settings.runs_dir, job.id)


JobFilesDep = Annotated[JobFiles, Depends(get_job_files)]


def get_token_name(request: Request) -> str:
    """The name of the request's token; empty if no token is needed."""
    return str(getattr(request.state, "token_name", ""))


TokenNameDep = Annotated[str, Depends(get_token_name)]


def get_admission(request: Request, settings: SettingsDep, token_name: TokenNameDep) -> Admission:
    """The limits of what this request queues."""
    agent = shorten(show_controls(request.headers.get("User-Agent", "")), length=_MAX_CLIENT_LENGTH)
    return Admission.of(settings, queued_by=token_name, client=agent)


AdmissionDep = Annotated[Admission, Depends(get_admission)]
