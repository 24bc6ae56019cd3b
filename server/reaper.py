"""Who takes jobs from the dead, and when it had better not."""

import time

from sqlalchemy import Engine

from server.job_queue import requeue_lost_jobs
from server.settings import Settings


class Reaper:
    """Returns the jobs of silent workers to the queue; each worker has one, and the server.

    While the database is away, all leases run out, those of living workers too. So whoever could
    not reach it for a while gives everybody a lease's time to be heard again.
    """

    def __init__(self, engine: Engine, *, settings: Settings) -> None:
        self._engine = engine
        self._max_attempts = settings.max_attempts
        self._lease_seconds = settings.lease_seconds
        self._longest_gap_seconds = max(settings.lease_seconds / 2, 2 * settings.heartbeat_seconds)
        self._called_at = time.monotonic()
        self._waits_until = 0.0

    def reap(self) -> int:
        """To be called right after a sign of life that the database took, every few seconds.
        Returns how many jobs were lost."""
        now = time.monotonic()
        if now - self._called_at > self._longest_gap_seconds:
            self._waits_until = now + self._lease_seconds
        self._called_at = now
        if now < self._waits_until:
            return 0
        return requeue_lost_jobs(
            self._engine, max_attempts=self._max_attempts, lease_seconds=self._lease_seconds
        )
