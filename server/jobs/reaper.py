"""The reaper requeues the jobs of dead workers. It spares workers whose heartbeats only failed
because of an outage of the database."""

import time
from collections.abc import Callable

from sqlalchemy import Engine

from server.jobs.queue import requeue_lost_jobs
from server.settings import Settings


class Reaper:
    """Requeues the jobs of workers without a heartbeat. Each worker and the server run a reaper.

    During an outage of the database all leases expire, even those of live workers. A reaper that
    could not reach the database therefore waits for one lease time before it requeues jobs.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._max_attempts = settings.max_attempts
        self._lease_seconds = settings.lease_seconds
        self._longest_gap_seconds = max(settings.lease_seconds / 2, 2 * settings.heartbeat_seconds)
        self._answered_at = clock()
        self._has_failed = False
        self._waits_until = 0.0

    def reap(self) -> int:
        """Requeue lost jobs. Call this every few seconds.

        A worker calls it right after each heartbeat that the database accepted. Returns the number
        of lost jobs. Raises SQLAlchemyError during an outage.
        """
        now = self._clock()
        if self._has_failed or now - self._answered_at > self._longest_gap_seconds:
            self._waits_until = now + self._lease_seconds
        self._has_failed = True
        num_lost = self._requeue() if now >= self._waits_until else self._ping()
        self._has_failed, self._answered_at = False, now
        return num_lost

    def _ping(self) -> int:
        with self._engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
        return 0

    def _requeue(self) -> int:
        return requeue_lost_jobs(
            self._engine, max_attempts=self._max_attempts, lease_seconds=self._lease_seconds
        )
