"""What surrounds the jobs: presets, workers, health."""

from importlib.metadata import version

from fastapi import APIRouter
from sqlmodel import col, select

from server.database import database_now
from server.dependencies import SessionDep, SettingsDep
from server.models import OPTION_SUMMARIES, Job, Option, Worker
from server.schemas import (
    Health,
    OptionList,
    OptionPublic,
    WorkerList,
    WorkerPublic,
    resolve_config,
)
from server.worker_registry import describe_state

MAX_WORKERS = 100

router = APIRouter(tags=["operations"])


@router.get("/options")
def list_options() -> OptionList:
    """The presets, each with the whole configuration that it stands for."""
    options = [
        OptionPublic(
            option=option,
            summary=OPTION_SUMMARIES[option],
            config=resolve_config(option, quick_test=False, overrides={}),
        )
        for option in Option
    ]
    return OptionList(data=options, has_more=False)


@router.get("/workers")
def list_workers(session: SessionDep, *, settings: SettingsDep) -> WorkerList:
    """Workers with device, current job and last heartbeat; the newest first."""
    newest = col(Worker.heartbeat_at).desc()
    rows = select(Worker, Job).join(Job, col(Worker.job_id) == Job.id, isouter=True)
    pairs = session.exec(rows.order_by(newest).limit(MAX_WORKERS + 1)).all()
    now = database_now(session)
    workers = [
        WorkerPublic(
            **worker.model_dump(exclude={"state"}),
            state=describe_state(worker, job=job, now=now, settings=settings),
            progress_at=job.progress_at if job else None,
        )
        for worker, job in pairs[:MAX_WORKERS]
    ]
    return WorkerList(data=workers, has_more=len(pairs) > MAX_WORKERS)


@router.get("/healthz")
def read_health() -> Health:
    """Answers as long as the process lives; asks nothing of the database."""
    return Health(status="ok", version=version("losslab"))
