"""What the server does by itself, again and again, as long as it runs."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

from server.database.engine import migrate
from server.files.datasets import list_left_out
from server.jobs import retention
from server.jobs.admission import Admission
from server.jobs.ages import AgeWatch
from server.jobs.answers import expire_answers
from server.jobs.orphans import OrphanSweep
from server.jobs.reaper import Reaper
from server.jobs.workers import watch_times
from server.judging.statistics import load_library
from server.judging.studies import ResultCache
from server.races import advance_races
from server.settings import Settings

_FREE_SPACE_SECONDS: Final = 60.0
_SWEEP_SECONDS: Final = 1800.0
_EXPIRY_SECONDS: Final = 600.0
_RACE_SECONDS: Final = 1.0
#: After the start, which it would slow down.
_WARM_UP_SECONDS: Final = 10.0
_OPEN_SECONDS: Final = 2.0
_MAX_TOLD: Final = 5

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def running(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run them while the context is entered."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_database(engine: Engine, settings: Settings) -> None:
    """Return once the database answers and has the newest schema."""
    told = ""
    while True:
        try:
            await asyncio.to_thread(migrate, engine, settings)
        except Exception as error:
            # Of whatever kind it is: if this loop ended, nobody would open the database any more.
            if str(error) != told:
                told = str(error)
                _logger.warning("the database is not there; waiting for it: %s", error)
        else:
            _logger.info("the database is there")
            return
        await asyncio.sleep(_OPEN_SECONDS)


async def keep_up(
    engine: Engine, settings: Settings, *, results: ResultCache, watch: AgeWatch
) -> None:
    """Do everything there is to do until cancelled."""
    reaper, sweep = Reaper(engine, settings=settings), OrphanSweep(engine, settings)

    def watch_workers() -> None:
        with Session(engine) as session:
            watch_times(session, watch)

    def race() -> None:
        advance_races(engine, cache=results, admission=Admission.of(settings))

    def free_space() -> None:
        if settings.max_storage_bytes:
            retention.free_space(engine, settings)

    def expire() -> None:
        expire_answers(engine)

    beat = settings.heartbeat_seconds
    await asyncio.to_thread(_tell_left_out, settings)
    await asyncio.gather(
        # No worker may be left to do it.
        _repeat(reaper.reap, every=beat, trouble="jobs of dead workers cannot be requeued"),
        _repeat(watch_workers, every=beat, trouble="the workers' heartbeats cannot be read"),
        _repeat(race, every=_RACE_SECONDS, trouble="races do not go on"),
        _repeat(free_space, every=_FREE_SPACE_SECONDS, trouble="no space was freed"),
        _repeat(expire, every=_EXPIRY_SECONDS, trouble="old idempotency keys stay"),
        _repeat(sweep.run, every=_SWEEP_SECONDS, trouble="files that no job names stay"),
        _warm_up(),
    )


def _tell_left_out(settings: Settings) -> None:
    """Name what somebody put into the folder of data sets and may look for in vain."""
    try:
        left_out = list_left_out(settings.datasets_dir)
    except OSError as error:
        _logger.warning("the folder of data sets cannot be read: %s", error)
        return
    for file in left_out[:_MAX_TOLD]:
        _logger.warning("datasets/%s is no data set: %s", file.file_name, file.reason)
    if len(left_out) > _MAX_TOLD:
        num_others = len(left_out) - _MAX_TOLD
        _logger.warning("%d other files in datasets/ are no data sets either", num_others)


async def _repeat(act: Callable[[], object], *, every: float, trouble: str) -> None:
    while True:
        try:
            await asyncio.to_thread(act)
        except (OSError, SQLAlchemyError) as error:
            _logger.warning("%s: %s", trouble, error)
        except Exception:
            # If this loop ended, nobody would do it any more.
            _logger.exception(trouble)
        await asyncio.sleep(every)


async def _warm_up() -> None:
    """Import the slow library of the tests, for which the first study would wait two seconds."""
    await asyncio.sleep(_WARM_UP_SECONDS)
    await asyncio.to_thread(load_library)
