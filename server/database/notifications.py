"""Notifications: an idle worker learns of a new job at once."""

import logging
import threading

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

_CHANNEL = "losslab_job"
_logger = logging.getLogger(__name__)


def notify_workers(session: Session) -> None:
    """Wake idle workers once this transaction has committed. Does nothing on SQLite."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection().exec_driver_sql(f"NOTIFY {_CHANNEL}")


class JobListener:
    """Waits for a job: on PostgreSQL for a notification, on SQLite until the next poll."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def wait(self, shutdown: threading.Event, *, poll_seconds: float) -> None:
        """Return when a job may be queued, when `shutdown` is set, or after `poll_seconds`."""
        if self._engine.dialect.name != "postgresql":
            shutdown.wait(poll_seconds)
            return
        # Imported here: a start on SQLite is 0.1 s faster without it.
        import psycopg  # noqa: PLC0415

        try:
            driver = self._listen().connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            for _ in driver.notifies(timeout=poll_seconds, stop_after=1):
                pass
        except (SQLAlchemyError, psycopg.Error) as error:
            _logger.warning("cannot listen for jobs, polling instead: %s", error)
            self.close()
            shutdown.wait(poll_seconds)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _listen(self) -> Connection:
        if self._connection is None:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql(f"LISTEN {_CHANNEL}")
            self._connection = connection
        return self._connection
