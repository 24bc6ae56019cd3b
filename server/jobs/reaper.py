"""The reaper requeues the jobs of dead workers, and spares those of living ones.

A worker is silent if a reaper has watched its lease for a lease's length and saw no heartbeat
renew it. The reaper counts only time in which it was awake itself and could write to the database:
whatever kept it from writing may have kept the worker from it too. The times in the database are
never compared with a clock. So a clock that is set, a machine that sleeps and a database that is
away or locked make no worker silent.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Engine, update
from sqlmodel import Session, col

from server.database.engine import database_now, write_transaction
from server.jobs.leases import SeenLease, read_leases
from server.jobs.queue import requeue_lost_jobs
from server.models.tables import Job
from server.settings import Settings


class Moment(NamedTuple):
    """A moment by this machine's two clocks, in seconds."""

    awake_seconds: float  #: does not go on while the machine sleeps, and is never set
    wall_seconds: float


def read_clocks() -> Moment:
    return Moment(time.monotonic(), time.time())


class Reaper:
    """Watches the leases of all running jobs. Each worker and the server have a reaper."""

    def __init__(
        self,
        engine: Engine,
        *,
        settings: Settings,
        read_clocks: Callable[[], Moment] = read_clocks,
    ) -> None:
        self._engine = engine
        self._read_clocks = read_clocks
        self._max_attempts = settings.max_attempts
        self._lease_seconds = settings.lease_seconds
        self._longest_gap_seconds = max(settings.lease_seconds / 2, 2 * settings.heartbeat_seconds)
        self._longest_wait_seconds = settings.heartbeat_seconds
        self._answered_at: Moment | None = None
        #: Since when, by `awake_seconds`, each lease has been as it is.
        self._seen: dict[SeenLease, float] = {}

    def reap(self) -> int:
        """Requeue the jobs of silent workers. Call this every few seconds.

        Returns the number of jobs. Raises SQLAlchemyError if the database cannot be written to.
        """
        asked_at = self._read_clocks()
        if self._answered_at is None or self._has_lost_time(self._answered_at, asked_at):
            self._seen.clear()
        self._answered_at = None  # until the transaction has ended well
        with write_transaction(self._engine) as session:
            _wait_for_writers(session)
            answered_at = self._read_clocks()
            if self._has_waited(asked_at, answered_at):
                self._seen.clear()
            num_lost = requeue_lost_jobs(
                session,
                self._watch(session, now=answered_at.awake_seconds),
                max_attempts=self._max_attempts,
                lease_seconds=self._lease_seconds,
            )
        self._answered_at = answered_at
        return num_lost

    def is_in_doubt(self) -> bool:
        """Whether a job runs whose worker is late by the clock: it is dead, or beats again soon."""
        with Session(self._engine) as session:
            now = database_now(session)
            return any(lease.expires_at < now for lease in read_leases(session))

    def _has_lost_time(self, before: Moment, now: Moment) -> bool:
        """Whether this process or its machine stood still, or a clock was set."""
        awake_seconds = now.awake_seconds - before.awake_seconds
        wall_seconds = now.wall_seconds - before.wall_seconds
        is_set = abs(wall_seconds - awake_seconds) > self._longest_wait_seconds
        return is_set or awake_seconds > self._longest_gap_seconds

    def _has_waited(self, asked_at: Moment, answered_at: Moment) -> bool:
        """Whether another program held a lock for so long that heartbeats may be waiting for it."""
        seconds = answered_at.awake_seconds - asked_at.awake_seconds
        return seconds > self._longest_wait_seconds

    def _watch(self, session: Session, *, now: float) -> list[SeenLease]:
        """Look at all leases; returns those that have been the same for too long."""
        self._seen = {lease: self._seen.get(lease, now) for lease in read_leases(session)}
        return [lease for lease, since in self._seen.items() if now - since >= self._lease_seconds]


def _wait_for_writers(session: Session) -> None:
    """Return once this transaction may write jobs; changes nothing.

    On SQLite the transaction has the lock already. On PostgreSQL a lock on the table and a standby
    let reads pass, and an update of no row does not.
    """
    session.connection().execute(update(Job).where(col(Job.id) == "").values(phase=None))
