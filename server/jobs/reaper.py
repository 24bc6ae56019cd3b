"""The reaper: requeues the jobs of dead workers, but not those of workers that an outage of the
database kept from sending heartbeats."""

import time

from sqlalchemy import Engine

from server.jobs.queue import requeue_lost_jobs
from server.settings import Settings


class Reaper:
    """Requeues the jobs of workers without heartbeat; each worker runs one, and so does the server.

    While the database is away, all leases run out, also those of live workers. So a reaper that
    could not reach the database waits for a lease's time before it requeues anything.
    """

    def __init__(self, engine: Engine, *, settings: Settings) -> None:
        self._engine = engine
        self._max_attempts = settings.max_attempts
        self._lease_seconds = settings.lease_seconds
        self._longest_gap_seconds = max(settings.lease_seconds / 2, 2 * settings.heartbeat_seconds)
        self._answered_at = time.monotonic()
        self._has_failed = False
        self._waits_until = 0.0

    def reap(self) -> int:
        """Call this every few seconds; a worker does so right after each heartbeat that the
        database took. Returns how many jobs were lost. Raises what an outage raises."""
        now = time.monotonic()
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
