"""The HTTP application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import FastAPI

from server.database import open_database
from server.event_feed import EventFeed
from server.pages import comparison as comparison_page
from server.pages import job as job_page
from server.pages import jobs as jobs_page
from server.pages import login, rendering
from server.problems import install_problem_handlers
from server.routes import comparisons, jobs, operations
from server.security import BearerAuthentication
from server.settings import Settings

_DESCRIPTION = """\
Trains β-VAEs on ARC grids under three loss configurations and says, with evidence, which one
escapes mode collapse. Post a job, watch its reconstructions, compare the verdicts.
"""


def create_app(settings: Settings) -> FastAPI:
    """Build the application; the database is opened, and migrated, when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = open_database(settings)
        app.state.event_feed = EventFeed(app.state.engine)
        reader = asyncio.create_task(app.state.event_feed.run())
        yield
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
        app.state.engine.dispose()

    app = FastAPI(
        title="Losslab", version=version("losslab"), description=_DESCRIPTION, lifespan=lifespan
    )
    app.state.settings = settings
    if token := settings.api_token.get_secret_value():
        app.add_middleware(BearerAuthentication, token=token)
    install_problem_handlers(app)
    for routes in (jobs, comparisons, operations):
        app.include_router(routes.router)
    for page in (jobs_page, job_page, comparison_page, login, rendering):
        app.include_router(page.router)
    return app
