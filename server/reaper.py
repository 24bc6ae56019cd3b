"""Who takes jobs from the dead, and when it had better not."""

import time

from sqlalchemy import Engine

from server.job_queue import requeue_lost_jobs
from server.settings import Settings


class Reaper:
    """Returns the jobs of silent workers to the queue; each worker has one, and the server.

    While the database is away, all leases run out, those of living workers too. So whoever could
    not reach it gives everybody a lease's time to be heard again.
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
        """To be called every few seconds; a worker does so right after a sign of life that the
        database took. Returns how many jobs were lost. Raises what an outage raises."""
        now = time.monotonic()
        if self._has_failed or now - self._answered_at > self._longest_gap_seconds:
            self._waits_until = now + self._lease_seconds
        self._has_failed = True
        num_lost = self._requeue() if now >= self._waits_until else self._look_whether_it_answers()
        self._has_failed, self._answered_at = False, now
        return num_lost

    def _look_whether_it_answers(self) -> int:
        with self._engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
        return 0

    def _requeue(self) -> int:
        return requeue_lost_jobs(
            self._engine, max_attempts=self._max_attempts, lease_seconds=self._lease_seconds
        )
