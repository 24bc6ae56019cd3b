"""The thread that keeps a job's lease alive, and hears when the job shall stop."""

import logging
import math
import threading
import time
from enum import StrEnum
from types import TracebackType
from typing import Self

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from server import leases
from server.leases import Lease, LeaseLostError
from server.reaper import Reaper
from server.settings import Settings

_LISTEN_SECONDS = 0.5
_OUTAGE_PAUSE_SECONDS = 1.0

_logger = logging.getLogger(__name__)


class StopReason(StrEnum):
    """Why training shall end before its last epoch; each ends differently."""

    requested = "requested"  #: a cancel or a pause; which of them stands in the database
    shutdown = "shutdown"
    lease_lost = "lease_lost"
    overdue = "overdue"  #: trained for as long as an attempt may


class Heartbeat:
    """Renews a lease while its `with` block runs.

    It has a thread of its own, so that a long step is no silence. `progress` (0 to 1) is
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
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

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
        """Whether the step after this one shall not be begun."""
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
                # Or the job has just ended, and nobody asks any more.
                self.stop_reason = StopReason.lease_lost
                return
            except SQLAlchemyError as error:
                # The lease outlives a short loss of the database; the next beat tries again.
                _logger.warning("heartbeat failed and will be tried again: %s", error)
                self._ended.wait(_OUTAGE_PAUSE_SECONDS)

    def _beat(self) -> None:
        leases.heartbeat(
            self._engine,
            self._lease,
            lease_seconds=self._settings.lease_seconds,
            progress=self.progress,
        )
        # While every worker is busy, nobody else looks after the jobs of the dead.
        self._reaper.reap()
