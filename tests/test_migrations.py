"""Up from every released schema, with data in the tables, on both databases."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from conftest import BOTH_DATABASES
from postgres import Postgres
from sqlalchemy import JSON, Connection, Engine, MetaData, create_engine, insert
from sqlalchemy.types import TypeEngine
from sqlmodel import Session, SQLModel, col, select

import server.database
from server import job_queue
from server.database import open_database, upgrade
from server.models import (
    Artifact,
    EpochMetrics,
    Job,
    JobEvent,
    JobStatus,
    Option,
    TrainingConfig,
    Worker,
)
from server.settings import Settings

pytestmark = BOTH_DATABASES

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SCRIPTS = ScriptDirectory(str(server.database._MIGRATIONS_DIR))
HEAD = SCRIPTS.get_current_head()
RELEASED = [script.revision for script in SCRIPTS.walk_revisions() if script.revision != HEAD]
JOB_IDS = {status: f"{number:012x}" for number, status in enumerate(JobStatus)}


@pytest.fixture(params=RELEASED)
def old_settings(
    request: pytest.FixtureRequest, database: str, settings: Settings
) -> Iterator[Settings]:
    """Settings of a database of an older release, with rows in every table."""
    if database == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        settings = settings.model_copy(update={"database_url": postgres.create_database()})
    settings.data_dir.mkdir(parents=True)
    engine = create_engine(settings.resolved_database_url)
    with engine.begin() as connection:
        upgrade(connection, revision=request.param)
        fill(connection)
    engine.dispose()
    yield settings


def fill(connection: Connection) -> None:
    """A job of each status, and one row in each of the other tables, as the old schema has them."""
    for status, job_id in JOB_IDS.items():
        put(connection, "job", id=job_id, status=status, config=TrainingConfig().model_dump(),
            metadata={"study": "old"}, option="b", name=f"a job that is {status}")  # fmt: skip
    job_id = JOB_IDS[JobStatus.succeeded]
    put(connection, "epoch_metrics", job_id=job_id, epoch=1, train_loss=0.25)
    put(connection, "job_event", job_id=job_id, kind="queued", message="option b queued")
    put(connection, "artifact", job_id=job_id, kind="checkpoint", epoch=1, file_name="x")
    put(connection, "worker", id="host/1", host="host", pid=1, device="cpu", state="stopped")


def put(connection: Connection, table_name: str, **values: object) -> None:
    """Insert a row; a column that must have a value and is not named gets a plain one."""
    metadata = MetaData()
    metadata.reflect(connection, only=[table_name])
    table = metadata.tables[table_name]
    row = dict(values)
    for column in table.columns:
        is_needed = not column.nullable and column.server_default is None
        is_counted = column.primary_key and column.name == "id" and column.name not in values
        if column.name not in row and is_needed and not is_counted:
            row[column.name] = _plain_value(column.type)
    connection.execute(insert(table).values(row))


def _plain_value(kind: TypeEngine[Any]) -> object:
    if isinstance(kind, JSON):
        return []
    plain: dict[type, object] = {int: 0, float: 0.5, str: "x", bool: False, datetime: AT}
    return plain[kind.python_type]


@pytest.fixture
def upgraded(old_settings: Settings) -> Iterator[Engine]:
    engine = open_database(old_settings)
    yield engine
    engine.dispose()


def test_upgraded_schema_is_that_of_the_models(upgraded: Engine) -> None:
    with upgraded.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert context.get_current_revision() == HEAD
        assert compare_metadata(context, SQLModel.metadata) == []


def test_upgrade_keeps_every_row_and_reads_it(upgraded: Engine) -> None:
    with Session(upgraded) as session:
        jobs = {job.status: job for job in session.exec(select(Job))}
        (epoch,) = session.exec(select(EpochMetrics)).all()
        (event,) = session.exec(select(JobEvent)).all()
        (artifact,) = session.exec(select(Artifact)).all()
        (worker,) = session.exec(select(Worker)).all()
    assert {status: job.id for status, job in jobs.items()} == JOB_IDS
    for status, job in jobs.items():
        assert (job.name, job.labels) == (f"a job that is {status}", {"study": "old"})
        assert job.training_config == TrainingConfig()
        assert (job.option, job.created_at) == (Option.b, AT)
        assert (job.resume_point, job.pause_requested_at, job.claimed_progress) == (None, None, 0)
    assert (epoch.epoch, epoch.train_loss, epoch.recorded_at) == (1, 0.25, AT)
    assert (event.kind, event.data) == ("queued", None)
    assert (artifact.file_name, artifact.epoch) == ("x", 1)
    assert (worker.host, worker.version, worker.torch_version) == ("host", "", "")


def test_queue_works_on_upgraded_rows(upgraded: Engine) -> None:
    for status in (JobStatus.paused, JobStatus.failed, JobStatus.cancelled):
        assert job_queue.resume(upgraded, JOB_IDS[status]).status is JobStatus.queued
    assert job_queue.pause(upgraded, JOB_IDS[JobStatus.queued]).status is JobStatus.paused
    claimed = [job_queue.claim(upgraded, worker_id="host/2", lease_seconds=30) for _ in range(4)]
    assert [job is not None for job in claimed] == [True, True, True, False]


def test_lost_job_of_the_old_release_is_taken_up_again(upgraded: Engine) -> None:
    with upgraded.begin() as connection:
        running = col(Job.id) == JOB_IDS[JobStatus.running]
        connection.execute(Job.__table__.update().where(running).values(lease_expires_at=AT))  # type: ignore[attr-defined]
    assert job_queue.requeue_lost_jobs(upgraded, max_attempts=3, lease_seconds=30) == 1
    job = job_queue.claim(
        upgraded, worker_id="host/2", lease_seconds=30, job_id=JOB_IDS[JobStatus.running]
    )
    assert job is not None
    assert json.loads(json.dumps(job.config)) == TrainingConfig().model_dump(mode="json")
