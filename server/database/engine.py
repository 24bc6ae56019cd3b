"""The database: engine, sessions and migrations, for SQLite and PostgreSQL alike."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event, func, inspect, text
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlmodel import Session, create_engine, select

from server.models.columns import utc_now
from server.settings import Settings

#: The newest of the migrations, which Alembic would have to be imported to find.
SCHEMA_REVISION = "0004"
_MIGRATIONS_DIR = Path(__file__).parent / "migrations"
# Any number will do, as long as every Losslab process takes the same.
_MIGRATION_LOCK = 0x1055_1AB
_BUSY_TIMEOUT_SECONDS = 30
_IDLE_TRANSACTION_SECONDS = 10
# A database whose machine is gone says nothing more; waiting for it ends after some ten seconds.
_CONNECTION = {
    "connect_timeout": 10,
    "tcp_user_timeout": 10_000,  # milliseconds
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

#: What a database raises that does not answer, is locked or full, or that ended a transaction in
#: which nothing had been asked for too long (InternalError).
OUTAGES = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)

_logger = logging.getLogger(__name__)


def open_database(settings: Settings) -> Engine:
    """Connect and bring the schema up to date; safe in several processes at once.

    What a statement carries, such as names and labels, stays out of errors and logs.
    """
    url = settings.resolved_database_url
    if url.startswith("sqlite"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {"timeout": _BUSY_TIMEOUT_SECONDS}
        engine = create_engine(url, connect_args=arguments, hide_parameters=True)
        _configure_sqlite(engine)
    else:
        # A worker that is frozen, or whose machine is lost, inside a transaction would keep the
        # job's row locked, and so keep others from taking the job over.
        idle = f"-c idle_in_transaction_session_timeout={_IDLE_TRANSACTION_SECONDS}s"
        arguments = _CONNECTION | {"options": idle}
        engine = create_engine(
            url, pool_pre_ping=True, connect_args=arguments, hide_parameters=True
        )
    _migrate(engine)
    return engine


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Session]:
    """A session that commits at the end. On SQLite it takes the write lock at its start: a
    read that turns into a write later would fail at once, whatever the busy timeout."""
    with Session(engine, expire_on_commit=False) as session:
        session.connection(execution_options={"sqlite_begin": "IMMEDIATE"})
        yield session
        session.commit()


def database_now(session: Session) -> datetime:
    """The database's clock, the one by which leases run. SQLite has none but this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return utc_now()
    now: datetime = session.exec(select(func.clock_timestamp())).one()
    return now


def is_outage(error: BaseException) -> bool:
    """Whether the database did not answer, was locked or full, so that the same may work later."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OUTAGES)


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        # SQLAlchemy shall begin transactions, not the driver, which would do so too late.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        # FULL, since an accepted job must outlive a power cut.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")


def _migrate(engine: Engine) -> None:
    if _read_revision(engine) == SCHEMA_REVISION:
        return
    with engine.execution_options(sqlite_begin="IMMEDIATE").begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        upgrade(connection, revision="head")


def _read_revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.execute(
            text("SELECT version_num FROM alembic_version")
        ).scalar()
        return revision


def upgrade(connection: Connection, *, revision: str) -> None:
    """Bring the schema up to a revision, as a part of the connection's transaction."""
    # 0.2 s of every start that finds the schema as it should be.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS_DIR))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
