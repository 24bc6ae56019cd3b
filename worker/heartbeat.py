"""The heartbeat: a thread that renews a job's lease and reads whether the job should stop."""

import logging
import math
import threading
import time
from enum import StrEnum
from types import TracebackType
from typing import Self

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from server.jobs import leases
from server.jobs.leases import Lease, LeaseLostError
from server.jobs.reaper import Reaper
from server.logs import keep_marks
from server.settings import Settings

_LISTEN_SECONDS = 0.5
_OUTAGE_PAUSE_SECONDS = 1.0

_logger = logging.getLogger(__name__)


class StopReason(StrEnum):
    """Why training should end before its last epoch; each reason ends the attempt differently."""

    requested = "requested"  #: a cancel or a pause; the job's row says which
    shutdown = "shutdown"
    lease_lost = "lease_lost"
    overdue = "overdue"  #: trained for longer than an attempt may


class Heartbeat:
    """Renews a lease while its `with` block runs.

    It has a thread of its own, so that a long step delays no heartbeat. `progress` (0 to 1) is
    written by the training thread and sent with every beat; `stop_reason` is set once.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        engine: Engine,
        settings: Settings,
        shutdown: threading.Event,
        reaper: Reaper,
    ) -> None:
        self.progress = 0.0
        self.stop_reason: StopReason | None = None
        self._lease = lease
        self._engine = engine
        self._settings = settings
        self._shutdown = shutdown
        self._reaper = reaper
        self._overdue_at = time.monotonic() + (settings.max_job_seconds or math.inf)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=keep_marks(self._run), name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def should_stop(self) -> bool:
        """Whether the next step should not begin."""
        if self.stop_reason is None and self._shutdown.is_set():
            self.stop_reason = StopReason.shutdown
        if self.stop_reason is None and time.monotonic() > self._overdue_at:
            self.stop_reason = StopReason.overdue
        return self.stop_reason is not None

    def set_progress(self, progress: float) -> None:
        self.progress = progress

    def _run(self) -> None:
        beat_at = time.monotonic() + self._settings.heartbeat_seconds
        while not self._ended.wait(_LISTEN_SECONDS):
            try:
                # A job that stops has its state to save, which may take longer than the lease.
                if self.stop_reason is None and leases.read_stop_request(self._engine, self._lease):
                    self.stop_reason = StopReason.requested
                if time.monotonic() >= beat_at:
                    self._beat()
                    beat_at = time.monotonic() + self._settings.heartbeat_seconds
            except LeaseLostError:
                # Or the job has just ended, and the reason no longer matters.
                self.stop_reason = StopReason.lease_lost
                return
            except SQLAlchemyError as error:
                # A lease outlasts a short outage of the database; the next heartbeat tries again.
                _logger.warning("heartbeat failed and will be tried again: %s", error)
                self._ended.wait(_OUTAGE_PAUSE_SECONDS)

    def _beat(self) -> None:
        leases.heartbeat(
            self._engine,
            self._lease,
            lease_seconds=self._settings.lease_seconds,
            progress=self.progress,
        )
        # While every worker is busy, no idle one requeues the jobs of dead workers.
        self._reaper.reap()
