"""The database: engine, sessions and migrations, for SQLite and PostgreSQL alike."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event, func, text
from sqlmodel import Session, create_engine, select

from server.models import utc_now
from server.settings import Settings

_MIGRATIONS_DIR = Path(__file__).parent / "migrations"
# Any number will do, as long as every Losslab process takes the same.
_MIGRATION_LOCK = 0x1055_1AB
_BUSY_TIMEOUT_SECONDS = 30


def open_database(settings: Settings) -> Engine:
    """Connect and bring the schema up to date; safe in several processes at once."""
    url = settings.resolved_database_url
    if url.startswith("sqlite"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_SECONDS})
        _configure_sqlite(engine)
    else:
        engine = create_engine(url, pool_pre_ping=True)
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
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS_DIR))
    head = ScriptDirectory.from_config(config).get_current_head()
    with engine.connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() == head:
            return
    with engine.execution_options(sqlite_begin="IMMEDIATE").begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
