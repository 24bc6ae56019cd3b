"""What routes ask for: settings, engine, a session, the job that the path names."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.artifacts import JobFiles
from server.event_feed import EventFeed
from server.models import EpochMetrics, Job
from server.settings import Settings


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


def get_session(engine: EngineDep) -> Iterator[Session]:
    """A session for reading; changes go through `server.job_queue`."""
    with Session(engine) as session:
        yield session


# Closed before the answer is sent, so that a slow reader or a stream holds no transaction.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


def get_job(job_id: str, session: SessionDep) -> Job:
    return find_job(session, job_id)


def find_job(session: Session, job_id: str) -> Job:
    """Raises HTTPException 404."""
    # PostgreSQL takes no NUL in a text; no job has one in its id either.
    job = session.get(Job, job_id) if job_id.isalnum() else None
    if job is None:
        raise HTTPException(404, f"there is no job {job_id!r}; GET /jobs lists those there are")
    return job


JobDep = Annotated[Job, Depends(get_job)]


def get_job_files(job: JobDep, settings: SettingsDep) -> JobFiles:
    return JobFiles(settings.runs_dir, job.id)


JobFilesDep = Annotated[JobFiles, Depends(get_job_files)]


def read_epochs(session: Session, job_ids: list[str]) -> dict[str, list[EpochMetrics]]:
    """The epochs of several jobs, oldest first, in one query."""
    epochs: dict[str, list[EpochMetrics]] = {job_id: [] for job_id in job_ids}
    rows = select(EpochMetrics).where(col(EpochMetrics.job_id).in_(job_ids))
    for row in session.exec(rows.order_by(col(EpochMetrics.epoch))):
        epochs[row.job_id].append(row)
    return epochs
