"""The HTTP application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from limits import parse
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from server import retention
from server.api_description import DescribedApi
from server.database import open_database
from server.dependencies import NUM_SESSIONS
from server.event_feed import EventFeed
from server.monitoring import RequestLog, StoreCollector
from server.pages import comparison as comparison_page
from server.pages import job as job_page
from server.pages import jobs as jobs_page
from server.pages import login, rendering
from server.problems import install_problem_handlers
from server.reaper import Reaper
from server.request_limits import MAX_BODY_BYTES, Deadlines, HeaderLimit, RateLimit
from server.routes import comparisons, datasets, jobs, operations
from server.security import Authentication, SameOrigin, ask_for_token, find_allowed_hosts
from server.settings import Settings

_FREE_SPACE_SECONDS = 60.0

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
        store = StoreCollector(engine, lease_seconds=settings.lease_seconds)
        registry.register(store)
        async with _background(
            app.state.event_feed.run(),
            _reap(engine, settings),
            _free_space(engine, settings),
        ):
            yield
        registry.unregister(store)
        # What a cancelled task asked of the database goes on in its thread, with a connection.
        await asyncio.get_running_loop().shutdown_default_executor()
        engine.dispose()

    app = DescribedApi(
        title="Losslab",
        version=version("losslab"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # a page of ours shows it: FastAPI's own would load scripts from elsewhere
        redoc_url=None,
        max_body_size=MAX_BODY_BYTES,
        middleware=_list_middleware(settings, registry=registry),
    )
    app.needs_token = bool(settings.tokens)
    app.state.settings = settings
    app.state.registry = registry
    install_problem_handlers(app)
    for routes in (jobs, comparisons, datasets, operations):
        app.include_router(routes.router)
    for page in (jobs_page, job_page, comparison_page, login, rendering):
        app.include_router(page.router)
    return app


def _list_middleware(settings: Settings, *, registry: CollectorRegistry) -> list[Middleware]:
    """From the outermost: what refuses comes before what costs, and the log sees all of it."""
    tokens = settings.tokens
    hosts = find_allowed_hosts(settings.allowed_hosts, is_open=not tokens)
    limit = parse(settings.rate_limit)
    layers = [
        Middleware(RequestLog, registry=registry),
        Middleware(SameOrigin, allowed_hosts=hosts),
        Middleware(HeaderLimit),
        Middleware(Deadlines, request_seconds=settings.request_seconds),
        Middleware(RateLimit, limit=limit),
        Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5),
    ]
    if tokens:
        # Whoever guesses tokens is held up by the address.
        strangers = RateLimit(ask_for_token, limit=limit)
        layers.insert(4, Middleware(Authentication, tokens=tokens, strangers=strangers))
    return layers


@asynccontextmanager
async def _background(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _reap(engine: Engine, settings: Settings) -> None:
    """Look after the jobs of dead workers until cancelled: there may be no worker left to do it."""
    reaper = Reaper(engine, settings=settings)
    while True:
        try:
            await asyncio.to_thread(reaper.reap)
        except SQLAlchemyError as error:
            _logger.warning("jobs of dead workers cannot be looked for: %s", error)
        await asyncio.sleep(settings.heartbeat_seconds)


async def _free_space(engine: Engine, settings: Settings) -> None:
    """Look after the disk until cancelled."""
    while settings.max_storage_bytes:
        try:
            await asyncio.to_thread(retention.free_space, engine, settings)
        except (OSError, SQLAlchemyError) as error:
            _logger.warning("no space was freed: %s", error)
        await asyncio.sleep(_FREE_SPACE_SECONDS)
