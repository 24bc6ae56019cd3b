"""One attempt at a job: what its parts share, and how they write during outages."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Engine
from tenacity import (
    RetryCallState,
    Retrying,
    before_sleep_log,
    retry_if_exception,
    wait_random_exponential,
)

from server.database.engine import is_outage
from server.files.artifacts import JobFiles
from server.jobs import records
from server.jobs.leases import Lease
from server.jobs.reaper import Reaper
from server.models.tables import EventKind, Job
from server.settings import Settings
from worker.heartbeat import Heartbeat

#: How long a worker that was told to stop still waits for the database; then its lease runs out.
GIVE_UP_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 5.0

_P = ParamSpec("_P")
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A claimed job with what is needed to run it."""

    job: Job
    lease: Lease
    files: JobFiles
    settings: Settings
    engine: Engine
    heartbeat: Heartbeat
    retrying: Retrying
    #: Whether the job's slot ends, since there was no memory beside other jobs.
    give_up_slot: Callable[[], bool]

    def write(
        self,
        change: Callable[Concatenate[Engine, Lease, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Make a change that needs the lease, and try again while the database is away.

        Raises LeaseLostError.
        """
        return self.retrying(change, self.engine, self.lease, *args, **kwargs)

    def warn(self, message: str) -> None:
        """Add a warning to the job's events. Raises LeaseLostError."""
        self.write(records.add_note, EventKind.warning, message=message)


def open_attempt(
    job: Job,
    *,
    settings: Settings,
    engine: Engine,
    shutdown: threading.Event,
    reaper: Reaper,
    give_up_slot: Callable[[], bool],
) -> Attempt:
    """The attempt that a claim began."""
    assert job.worker_id is not None, "the job was not claimed"
    lease = Lease(job.id, job.attempt, job.worker_id)
    return Attempt(
        job,
        lease,
        files=JobFiles(settings.runs_dir, job.id),
        settings=settings,
        engine=engine,
        heartbeat=Heartbeat(
            lease, engine=engine, settings=settings, shutdown=shutdown, reaper=reaper
        ),
        retrying=outlast_outages(shutdown),
        give_up_slot=give_up_slot,
    )


def outlast_outages(
    shutdown: threading.Event, *, give_up_seconds: float = GIVE_UP_SECONDS
) -> Retrying:
    """Calls a function again while the database is away, until `shutdown` is set; for at least
    `give_up_seconds`, if something would be lost."""

    def is_given_up(state: RetryCallState) -> bool:
        return shutdown.is_set() and (state.seconds_since_start or 0.0) >= give_up_seconds

    return Retrying(
        retry=retry_if_exception(is_outage),
        wait=wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE_SECONDS),
        stop=is_given_up,
        before_sleep=before_sleep_log(_logger, logging.WARNING),
        reraise=True,
    )
