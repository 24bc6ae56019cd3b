"""What surrounds the jobs: presets, workers, health."""

from importlib.metadata import version

from fastapi import APIRouter
from sqlmodel import col, select

from server.dependencies import SessionDep
from server.models import OPTION_SUMMARIES, Option, Worker
from server.schemas import Health, OptionList, OptionPublic, WorkerList, resolve_config

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
def list_workers(session: SessionDep) -> WorkerList:
    """Workers with device, current job and last heartbeat; the newest first."""
    workers = session.exec(select(Worker).order_by(col(Worker.heartbeat_at).desc()).limit(100))
    return WorkerList(data=list(workers), has_more=False)


@router.get("/healthz")
def read_health() -> Health:
    """Answers as long as the process lives; asks nothing of the database."""
    return Health(status="ok", version=version("losslab"))
