"""Engine, transactions and migrations."""

import sqlite3
import threading
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, SQLModel

from server.database.engine import open_database, write_transaction
from server.database.schema import SCHEMA_REVISION, upgrade
from server.models.options import BuiltInOption
from server.models.tables import Job
from server.settings import Settings


def test_migrations_make_the_schema_of_the_models(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []


def test_expected_revision_is_the_newest_migration(engine: Engine) -> None:
    assert ScriptDirectory("server/database/migrations").get_current_head() == SCHEMA_REVISION
    with engine.connect() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    assert revision == SCHEMA_REVISION


def test_opening_again_changes_nothing(settings: Settings, engine: Engine) -> None:
    with write_transaction(engine) as session:
        session.add(Job(id="0" * 12, option=BuiltInOption.a, config={}))
    again = open_database(settings)
    with Session(again) as session:
        assert session.get(Job, "0" * 12) is not None
    again.dispose()


def test_processes_that_start_together_migrate_once(settings: Settings) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            open_database(settings).dispose()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_sqlite_keeps_a_write_ahead_log_and_syncs_every_commit(engine: Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_write_transaction_holds_the_write_lock_from_its_start(
    settings: Settings, engine: Engine
) -> None:
    with write_transaction(engine) as session:
        session.connection()
        other = sqlite3.connect(settings.data_dir / "losslab.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


def test_failed_transaction_leaves_nothing(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), write_transaction(engine) as session:
        session.add(Job(id="0" * 12, option=BuiltInOption.a, config={}))
        session.flush()
        raise ZeroDivisionError
    with Session(engine) as session:
        assert session.get(Job, "0" * 12) is None


def test_unknown_status_cannot_be_stored(engine: Engine) -> None:
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO job (id, option, quick_test, metadata, priority, config, status, "
                "progress, attempt, num_lost_attempts, created_at, epochs_completed) VALUES "
                "('1', 'a', 0, '{}', 0, '{}', 'lost', 0, 0, 0, '2026-01-01', 0)"
            )
        )


def test_loss_of_the_databases_machine_is_noticed(migrated_url: str) -> None:
    engine = open_database(Settings(database_url=migrated_url))
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        asked_for = driver.info.get_parameters()
    engine.dispose()
    # Without these, a lost network would be noticed only after a quarter of an hour.
    assert int(asked_for["tcp_user_timeout"]) <= 10_000
    idle, interval, count = (
        int(asked_for[f"keepalives_{name}"]) for name in ("idle", "interval", "count")
    )
    assert idle + interval * count <= 15


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("postgresql://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgres://u@h/d", "postgresql+psycopg://u@h/d"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
    ],
)
def test_database_url_gets_its_driver(url: str, resolved: str) -> None:
    assert Settings(database_url=url).resolved_database_url == resolved


def test_default_is_sqlite_in_the_data_directory(tmp_path: Path) -> None:
    url = Settings(data_dir=tmp_path).resolved_database_url
    assert url == f"sqlite:///{tmp_path}/losslab.db"


def test_schema_is_upgraded_where_sqlite_protects_the_text_of_its_tables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    with engine.begin() as connection:
        upgrade(connection, revision="0004")
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.set_authorizer(
            lambda action, table, *_rest: (
                sqlite3.SQLITE_DENY
                if (action, table) == (sqlite3.SQLITE_UPDATE, "sqlite_master")
                else sqlite3.SQLITE_OK
            )
        )
        upgrade(connection, revision="0005")
        driver.set_authorizer(None)
        upgrade(connection, revision="head")
    with engine.connect() as connection:
        version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        job = connection.exec_driver_sql(
            "SELECT sql FROM sqlite_master WHERE name = 'job'"
        ).scalar()
    engine.dispose()
    assert version == SCHEMA_REVISION
    assert "CHECK (option IN" in str(job)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "job.option keeps its CHECK",
        "artifact.kind keeps its CHECK",
    ]
