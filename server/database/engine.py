"""The database: engine, transactions and migrations, for both SQLite and PostgreSQL."""

import errno
import logging
import mmap
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from sqlalchemy import Connection, Engine, event, func, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlmodel import Session, create_engine, select

from server.database.schema import migrate_schema
from server.environment.access import AccessError, prepare_folder
from server.environment.modes import close_to_others, file_mode
from server.errors import InvalidInputError
from server.models.columns import utc_now
from server.settings import Settings

_BUSY_TIMEOUT_SECONDS = 30
# A database whose machine is lost closes no connection; these limits end the wait after about ten
# seconds.
_CONNECTION = {
    "connect_timeout": 10,
    "tcp_user_timeout": 10_000,  # milliseconds
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

#: Any number, the same in all servers; see `take_turn`.
_ADMISSION_LOCK = 7_316_492
#: Readers do not wait for writers, and an accepted job survives a power failure.
_BEST_MODES = ("WAL", "FULL")
#: Why SQLite refuses a statement for a while.
_PASSING_CODES = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_PROTOCOL")
#: Why PostgreSQL refuses connections for a while.
_PASSING_STATES = (
    "starting up", "shutting down", "recovery", "not yet accepting", "too many", "already",
    "terminating", "remaining connection",
)  # fmt: skip

#: Raised if the database does not answer, is locked or full, or ended a transaction that was idle
#: for too long (InternalError).
OUTAGES = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)

#: What SQLite says by its codes, as remedies.
_REFUSALS = {
    "SQLITE_READONLY": "the database may only be read; make the file and its folder writable",
    "SQLITE_CANTOPEN": "the database cannot be opened; make the file and its folder writable",
    "SQLITE_PERM": "the database may not be opened; make the file and its folder writable",
    "SQLITE_NOTADB": "no SQLite database; name another file (LOSSLAB_DATABASE_URL)",
    "SQLITE_CORRUPT": "the database is damaged; restore a backup",
    "SQLITE_IOERR": "its disk cannot be read or written; look at the disk",
}

_logger = logging.getLogger(__name__)
_watch: ContextVar["CommitWatch | None"] = ContextVar("commit watch", default=None)


def open_database(settings: Settings) -> Engine:
    """Connect and migrate the schema to the newest revision; safe in several processes at once."""
    engine = make_engine(settings)
    try:
        migrate(engine, settings)
    except BaseException:
        engine.dispose()
        raise
    return engine


def make_engine(settings: Settings) -> Engine:
    """Prepare connections, without asking the database yet.

    Errors and logs never show the parameters of a statement, such as names and labels. Raises
    InvalidInputError.
    """
    url = settings.resolved_database_url
    if url.startswith("sqlite"):
        _check_file(url)
        arguments: dict[str, Any] = {"timeout": _BUSY_TIMEOUT_SECONDS}
        engine = _create_engine(url, connect_args=arguments)
        _configure_sqlite(engine)
    else:
        # If a worker freezes or its machine is lost inside a transaction, the job's row stays
        # locked, and no other worker could take the job over. So PostgreSQL ends idle transactions.
        idle_ms = round(1000 * settings.idle_transaction_seconds)
        idle = f"-c idle_in_transaction_session_timeout={idle_ms}ms"
        arguments = _CONNECTION | {"options": idle}
        engine = _create_engine(url, pool_pre_ping=True, connect_args=arguments)
    return engine


def _create_engine(url: str, **options: Any) -> Engine:
    """Raises InvalidInputError, which has no part of the URL."""
    try:
        return create_engine(url, hide_parameters=True, **options)
    except (ArgumentError, TypeError, ValueError):
        reason = "has a parameter that is unknown or cannot have this value"
        raise InvalidInputError(f"LOSSLAB_DATABASE_URL {reason}") from None


def migrate(engine: Engine, settings: Settings) -> None:
    """Migrate the schema to the newest revision, if it is older.

    Raises SchemaError, and AccessError if SQLite cannot use its file, whose own messages name no
    path.
    """
    try:
        migrate_schema(engine, datasets_dir=settings.datasets_dir)
    except DatabaseError as error:
        if (reason := find_refusal(error)) is None:
            raise
        raise AccessError(f"{engine.url.database}: {reason}") from None


def find_refusal(error: DatabaseError) -> str | None:
    """Why SQLite cannot use its file, if a retry cannot help; None for any other error."""
    name = getattr(error.orig, "sqlite_errorname", "")
    return next((text for code, text in _REFUSALS.items() if name.startswith(code)), None)


def _check_file(url: str) -> None:
    """Make an SQLite file and its folder, see that both can be written to, and close the file to
    others. Raises AccessError.

    SQLite's own messages name no path. Its other files, `-wal` and `-shm`, get this one's mode.
    """
    if (name := make_url(url).database) and not name.startswith((":memory:", "file:")):
        path = Path(name)
        prepare_folder(path.parent, parts=[path])
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, file_mode()))
        except FileExistsError:
            pass
        except OSError as error:
            raise AccessError.of(error, path=path) from None
        close_to_others([path])


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Session]:
    """A session that commits at the end.

    On SQLite it takes the write lock at the start: a transaction that reads first and writes later
    would fail at once if another one has written meanwhile, whatever the busy timeout.
    """
    with Session(engine, expire_on_commit=False) as session:
        session.connection(execution_options={"sqlite_begin": "IMMEDIATE"})
        yield session
        session.commit()
        if (watch := _watch.get()) is not None:
            watch.has_committed = True


def take_turn(session: Session) -> None:
    """Let transactions that admit something (a job, a data set, the end of a data set) follow one
    another: wait for the one before, also of another server, and keep the turn until the end.

    Rows are locked before this is called, and afterwards none that others may hold: two
    transactions that each have what the other one wants would wait forever.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_ADMISSION_LOCK)))
        return
    # On SQLite a `write_transaction` has the only lock for writing since it began.
    options = session.connection().get_execution_options()
    assert options.get("sqlite_begin") == "IMMEDIATE", "not in a write_transaction"


@dataclass(slots=True)
class CommitWatch:
    """Whether a `write_transaction` has committed since the watch began, in this context and in the
    threads to which it is passed on."""

    has_committed: bool = False


def watch_commits() -> CommitWatch:
    """Begin a watch, which replaces the one before."""
    watch = CommitWatch()
    _watch.set(watch)
    return watch


def database_now(session: Session) -> datetime:
    """The time by the database's clock, which decides about leases. On SQLite, this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return utc_now()
    now: datetime = session.exec(select(func.clock_timestamp())).one()
    return now


def is_outage(error: BaseException) -> bool:
    """Whether the database did not answer, was locked or full, so that a retry may succeed."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OUTAGES)


def is_refusal(error: BaseException) -> bool:
    """Whether the database refuses this process, for example its password or its file's mode: no
    retry helps until somebody has changed that."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    if code:
        return not code.startswith(_PASSING_CODES)
    # PostgreSQL's driver tells the errors of a new connection by their text alone.
    message = str(error)
    return "FATAL:" in message and not any(words in message for words in _PASSING_STATES)


def _configure_sqlite(engine: Engine) -> None:
    path = engine.url.database
    is_file = path and not path.startswith((":memory:", "file:"))
    journal_mode, synchronous = _choose_modes(Path(path or "").parent) if is_file else _BEST_MODES

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        # SQLAlchemy should begin transactions; the driver would begin them too late.
        connection.isolation_level = None
        connection.execute(f"PRAGMA journal_mode={journal_mode}")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")


@cache
def _choose_modes(folder: Path) -> tuple[str, str]:
    """SQLite's journal mode and its synchronous mode: the best that the file system can do.

    What it cannot do is reported once.
    """
    journal_mode, synchronous = _BEST_MODES
    if not _can(folder, lambda descriptor: mmap.mmap(descriptor, mmap.PAGESIZE).close()):
        journal_mode = "DELETE"
        _logger.warning(
            "%s: the file system cannot share memory; readers of the database wait for writers",
            folder,
        )
    if not _can(folder, os.fsync):
        synchronous = "OFF"
        _logger.warning(
            "%s: the file system cannot sync a file; a power failure may damage the database",
            folder,
        )
    return journal_mode, synchronous


def _can(folder: Path, step: Callable[[int], object]) -> bool:
    """Whether the file system can do this with a file; errors of other kinds are SQLite's own."""
    try:
        with NamedTemporaryFile(dir=folder, prefix=".", suffix="-shm") as file:
            file.truncate(mmap.PAGESIZE)
            step(file.fileno())
    except OSError as error:
        unable = (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
        return error.errno not in unable
    return True
