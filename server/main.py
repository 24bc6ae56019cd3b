"""The HTTP application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from server.api.dependencies import NUM_SESSIONS
from server.api.description import DescribedApi
from server.api.event_feed import EventFeed
from server.api.limits import MAX_BODY_BYTES, Deadlines, HeaderLimit
from server.api.monitoring import RequestLog, StoreCollector
from server.api.problems import install_problem_handlers
from server.api.rates import Rate, RateLimit
from server.api.routes import (
    comparisons,
    datasets,
    jobs,
    operations,
    options,
    studies,
    study_reports,
)
from server.api.security import Authentication, SameOrigin, ask_for_token, find_allowed_hosts
from server.dashboard.presentation import install_dashboard
from server.database.engine import open_database
from server.jobs import retention
from server.jobs.ages import AgeWatch
from server.jobs.reaper import Reaper
from server.jobs.workers import watch_times
from server.judging.statistics import load_library
from server.judging.studies import ResultCache
from server.judging.verdicts import VerdictCache
from server.races import advance_races
from server.settings import Settings

_FREE_SPACE_SECONDS = 60.0
_RACE_SECONDS = 1.0
#: After the start, which it would slow down.
_WARM_UP_SECONDS = 10.0

_DESCRIPTION = """\
Trains β-VAEs on ARC grids under three loss configurations and says, with evidence, which one
escapes mode collapse. Post a job, watch its reconstructions, compare the verdicts.
"""


_logger = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """Build the application; the database is opened, and migrated, when it starts."""

    registry = CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = app.state.engine = open_database(settings)
        app.state.session_turns = asyncio.Semaphore(NUM_SESSIONS)
        app.state.event_feed = EventFeed(engine)
        store = StoreCollector(
            engine, lease_seconds=settings.lease_seconds, watch=app.state.worker_watch
        )
        registry.register(store)
        async with _background(
            app.state.event_feed.run(),
            _reap(engine, settings),
            _watch_workers(engine, settings, watch=app.state.worker_watch),
            _free_space(engine, settings),
            _race(engine, settings, cache=app.state.result_cache),
            _warm_up(),
        ):
            yield
        registry.unregister(store)
        # A cancelled task's database query goes on in its thread and holds a connection; wait.
        await asyncio.get_running_loop().shutdown_default_executor()
        engine.dispose()

    app = DescribedApi(
        title="Losslab",
        version=version("losslab"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from other sites; ours is at /docs
        redoc_url=None,
        max_body_size=MAX_BODY_BYTES,
        middleware=_list_middleware(settings, registry=registry),
    )
    app.needs_token = bool(settings.tokens)
    app.state.settings = settings
    app.state.registry = registry
    app.state.worker_watch = AgeWatch()
    app.state.verdict_cache = VerdictCache()
    app.state.result_cache = ResultCache()
    install_problem_handlers(app)
    for routes in (jobs, options, studies, study_reports, comparisons, datasets, operations):
        app.include_router(routes.router)
    install_dashboard(app)
    return app


def _list_middleware(settings: Settings, *, registry: CollectorRegistry) -> list[Middleware]:
    """From the outermost: first the log, then what refuses requests, then what does work."""
    hosts = find_allowed_hosts(settings.allowed_hosts, is_open=not settings.tokens)
    rate = Rate.parse(settings.rate_limit)
    # Attempts to guess a token are limited per address.
    unauthenticated = RateLimit(ask_for_token, rate=rate)
    authentication = Middleware(
        Authentication, tokens=settings.tokens, unauthenticated=unauthenticated
    )
    return [
        Middleware(RequestLog, registry=registry),
        Middleware(SameOrigin, allowed_hosts=hosts),
        Middleware(HeaderLimit),
        Middleware(
            Deadlines,
            request_seconds=settings.request_seconds,
            send_seconds=settings.send_seconds,
        ),
        *([authentication] if settings.tokens else []),
        Middleware(RateLimit, rate=rate),
        Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5),
    ]


@asynccontextmanager
async def _background(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _reap(engine: Engine, settings: Settings) -> None:
    """Requeue the jobs of dead workers until cancelled: no worker may be left to do it."""
    reaper = Reaper(engine, settings=settings)
    while True:
        try:
            await asyncio.to_thread(reaper.reap)
        except SQLAlchemyError as error:
            _logger.warning("jobs of dead workers cannot be requeued: %s", error)
        await asyncio.sleep(settings.heartbeat_seconds)


async def _watch_workers(engine: Engine, settings: Settings, *, watch: AgeWatch) -> None:
    """Look at the workers' heartbeats until cancelled, so that no clock decides who is alive."""

    def look() -> None:
        with Session(engine) as session:
            watch_times(session, watch)

    while True:
        try:
            await asyncio.to_thread(look)
        except SQLAlchemyError as error:
            _logger.warning("the workers' heartbeats cannot be read: %s", error)
        await asyncio.sleep(settings.heartbeat_seconds)


async def _race(engine: Engine, settings: Settings, *, cache: ResultCache) -> None:
    """Queue the next looks of races until cancelled."""
    limit = settings.max_queued_jobs
    while True:
        try:
            await asyncio.to_thread(advance_races, engine, cache=cache, max_queued_jobs=limit)
        except SQLAlchemyError as error:
            _logger.warning("races do not go on: %s", error)
        await asyncio.sleep(_RACE_SECONDS)


async def _warm_up() -> None:
    """Import the slow library of the tests, for which the first study would wait two seconds."""
    await asyncio.sleep(_WARM_UP_SECONDS)
    await asyncio.to_thread(load_library)


async def _free_space(engine: Engine, settings: Settings) -> None:
    """Keep the data directory below its size limit until cancelled."""
    while settings.max_storage_bytes:
        try:
            await asyncio.to_thread(retention.free_space, engine, settings)
        except (OSError, SQLAlchemyError) as error:
            _logger.warning("no space was freed: %s", error)
        await asyncio.sleep(_FREE_SPACE_SECONDS)
