"""Routes for workers, health and metrics."""

import logging
import tempfile
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.dependencies import OpenedEngineDep, SessionDep, SettingsDep, WorkerWatchDep
from server.api.problems import PROBLEM_RESPONSES
from server.api.queries import MAX_PAGE_SIZE
from server.api.schemas import Health, Readiness, WorkerList, WorkerPublic
from server.database.engine import OUTAGES
from server.database.schema import SchemaError, check_schema
from server.environment.access import AccessError, check_writable
from server.jobs import workers
from server.jobs.ages import AgeWatch
from server.messages import describe_error
from server.settings import Settings

_logger = logging.getLogger(__name__)

router = APIRouter(tags=["operations"], responses=PROBLEM_RESPONSES)


@router.get("/workers")
def list_workers(
    session: SessionDep, *, settings: SettingsDep, watch: WorkerWatchDep
) -> WorkerList:
    """Workers with device, current job and last heartbeat; newest first."""
    reports = workers.list_workers(session, settings=settings, limit=MAX_PAGE_SIZE + 1, watch=watch)
    data = [WorkerPublic.of(report) for report in reports[:MAX_PAGE_SIZE]]
    return WorkerList(data=data, has_more=len(reports) > MAX_PAGE_SIZE)


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(request: Request) -> Response:
    """For Prometheus: jobs, queue, workers, requests."""
    registry: CollectorRegistry = request.app.state.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/healthz")
def read_health() -> Health:
    """Answers as long as the process runs; does not use the database."""
    return Health(status="ok", version=version("losslab"))


@router.get("/readyz", responses={503: {"model": Readiness}})
def read_readiness(
    *, engine: OpenedEngineDep, settings: SettingsDep, watch: WorkerWatchDep, response: Response
) -> Readiness:
    """Whether jobs can be accepted: 503 while the database or the disk fails. Also counts the live
    workers."""
    num_workers = _count_live_workers(engine, settings=settings, watch=watch)
    is_writable = _is_writable(settings)
    is_ready = num_workers is not None and is_writable
    response.status_code = 200 if is_ready else 503
    return Readiness(
        status="ready" if is_ready else "not_ready",
        database=num_workers is not None,
        disk=is_writable,
        num_workers=num_workers or 0,
    )


def _count_live_workers(
    engine: Engine | None, *, settings: Settings, watch: AgeWatch
) -> int | None:
    """None if the database does not answer, was never there, or was migrated by a newer version."""
    if engine is None:
        return None
    try:
        check_schema(engine)
        with Session(engine) as session:
            return workers.count_live(session, lease_seconds=settings.lease_seconds, watch=watch)
    except (*OUTAGES, SchemaError) as error:
        _logger.warning("not ready: %s", error)
        return None


def _is_writable(settings: Settings) -> bool:
    try:
        with tempfile.TemporaryFile(dir=settings.data_dir) as file:
            file.write(b"0")
            file.flush()
        for folder in settings.file_dirs:
            check_writable(folder)
    except (OSError, AccessError) as error:
        _logger.warning("not ready: %s", describe_error(error))
        return False
    return True
