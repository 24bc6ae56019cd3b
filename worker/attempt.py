"""One attempt at a job: what its parts share, and how they write through outages."""

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

from server import job_records
from server.artifacts import JobFiles
from server.database import is_outage
from server.leases import Lease
from server.models import EventKind, Job
from server.reaper import Reaper
from server.settings import Settings
from worker.heartbeat import Heartbeat

#: A worker that was told to stop waits no longer for the database; its lease will run out.
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

    def write(
        self,
        change: Callable[Concatenate[Engine, Lease, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Make a change that needs the lease, again and again while the database is away.

        Raises LeaseLostError.
        """
        return self.retrying(change, self.engine, self.lease, *args, **kwargs)

    def warn(self, message: str) -> None:
        """Tell the job's readers of something that does not end it. Raises LeaseLostError."""
        self.write(job_records.add_note, EventKind.warning, message=message)


def open_attempt(
    job: Job, *, settings: Settings, engine: Engine, shutdown: threading.Event, reaper: Reaper
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
    )


def outlast_outages(shutdown: threading.Event) -> Retrying:
    """Calls a function again and again while the database is away, until it is told to stop."""

    def is_given_up(state: RetryCallState) -> bool:
        return shutdown.is_set() and (state.seconds_since_start or 0.0) > GIVE_UP_SECONDS

    return Retrying(
        retry=retry_if_exception(is_outage),
        wait=wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE_SECONDS),
        stop=is_given_up,
        before_sleep=before_sleep_log(_logger, logging.WARNING),
        reraise=True,
    )
