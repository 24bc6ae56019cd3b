"""The HTTP application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from server.api.addresses import PathPrefix
from server.api.bodies import BodyRules, HeadAsGet, InertJson
from server.api.description import DescribedApi
from server.api.event_feed import EventFeed
from server.api.limits import Deadlines, HeaderLimit
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
from server.api.turns import make_session_turns, make_turns
from server.api.uploads import Uploads
from server.dashboard.presentation import install_dashboard
from server.database.engine import is_outage, is_refusal, make_engine, migrate
from server.files.inspection import end_checks
from server.jobs.ages import AgeWatch
from server.judging.studies import ResultCache
from server.judging.verdicts import VerdictCache
from server.settings import Settings
from server.upkeep import keep_up, running, wait_for_database

#: Longer answers are compressed in a thread, since others would wait for it.
_THREAD_BYTES = 32 * 1024

_DESCRIPTION = """\
Trains β-VAEs on ARC grids under three loss configurations and says, with evidence, which one
escapes mode collapse. Post a job, watch its reconstructions, compare the verdicts.
"""


def create_app(settings: Settings) -> FastAPI:
    """Build the application; the database is opened, and migrated, when it starts.

    A database that is away then is waited for. Until it is there, requests are answered 503.
    """

    registry = CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = app.state.engine = make_engine(settings)
        app.state.is_open = _is_there(engine, settings)
        app.state.session_turns = make_session_turns(settings)
        app.state.uploads = Uploads()
        app.state.event_feed = EventFeed(engine)
        watch: AgeWatch = app.state.worker_watch
        store = StoreCollector(engine, lease_seconds=settings.lease_seconds, watch=watch)

        async def work() -> None:
            if not app.state.is_open:
                await wait_for_database(engine, settings)
                app.state.is_open = True
            registry.register(store)
            try:
                await asyncio.gather(
                    app.state.event_feed.run(),
                    keep_up(engine, settings, results=app.state.result_cache, watch=watch),
                )
            finally:
                registry.unregister(store)

        async with running(work()):
            yield
        end_checks()
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
        middleware=_list_middleware(settings, registry=registry),
    )
    app.needs_token = bool(settings.tokens)
    app.state.settings = settings
    app.state.registry = registry
    app.state.worker_watch = AgeWatch()
    app.state.verdict_cache = VerdictCache()
    app.state.result_cache = ResultCache()
    app.state.turns = make_turns(settings)
    install_problem_handlers(app)
    for routes in (jobs, options, studies, study_reports, comparisons, datasets, operations):
        app.include_router(routes.router)
    install_dashboard(app)
    return app


def _list_middleware(settings: Settings, *, registry: CollectorRegistry) -> list[Middleware]:
    """From the outermost: the path and the log, then what refuses requests, then what works."""
    hosts = find_allowed_hosts(settings.allowed_hosts, is_open=not settings.tokens)
    rate = Rate.parse(settings.rate_limit)
    # Attempts to guess a token are limited per address.
    unauthenticated = RateLimit(ask_for_token, rate=rate)
    authentication = Middleware(
        Authentication,
        tokens=settings.tokens,
        min_secret_length=settings.min_secret_length,
        unauthenticated=unauthenticated,
    )
    return [
        Middleware(PathPrefix, prefix=settings.root_path),
        Middleware(RequestLog, registry=registry),
        Middleware(HeadAsGet),
        Middleware(SameOrigin, allowed_hosts=hosts),
        Middleware(HeaderLimit),
        Middleware(
            Deadlines,
            request_seconds=settings.request_seconds,
            send_seconds=settings.send_seconds,
        ),
        *([authentication] if settings.tokens else []),
        Middleware(RateLimit, rate=rate),
        Middleware(BodyRules),
        Middleware(
            GZipMiddleware, minimum_size=1000, compresslevel=5, thread_minimum_size=_THREAD_BYTES
        ),
        Middleware(InertJson),
    ]


def _is_there(engine: Engine, settings: Settings) -> bool:
    """Whether the database could be opened. Raises SQLAlchemyError if a retry cannot help."""
    try:
        migrate(engine, settings)
    except SQLAlchemyError as error:
        if not is_outage(error) or is_refusal(error):
            raise
        return False
    return True
