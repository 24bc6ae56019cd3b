"""Data of any older version survives the upgrade, on both databases."""

import hashlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from conftest import BOTH_DATABASES
from fastapi.testclient import TestClient
from postgres import Postgres
from sqlalchemy import Column, Connection, Engine, MetaData, Table, func, insert, inspect
from sqlmodel import Session, SQLModel, create_engine, select
from statements import recording

from server.database import engine as database_module
from server.database.engine import open_database
from server.database.schema import upgrade
from server.jobs import leases, queue
from server.jobs.leases import Lease
from server.jobs.reaper import Reaper
from server.models.columns import utc_now
from server.models.configuration import (
    EARLIER_VALUES,
    TrainingConfig,
    compute_config_sha256,
    read_config,
)
from server.models.epochs import EpochMetrics
from server.models.studies import Study
from server.models.tables import (
    Artifact,
    IdempotencyKey,
    Job,
    JobEvent,
    JobLabel,
    JobStatus,
    Worker,
)
from server.settings import Settings

MIGRATIONS_DIR = Path(database_module.__file__).parent / "migrations"
LONG_AGO = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
WORKER_ID = "host/1/abc"
JOB_IDS = {status: f"{number:012x}" for number, status in enumerate(JobStatus, 1)}
#: The uploaded data sets of two jobs; the file of the second was deleted.
DATASETS = {JobStatus.succeeded: "mine", JobStatus.cancelled: "deleted"}
NUM_MANY = 300
#: Columns whose value is no default.
COMPUTED = {"id", "config_sha256", "num_bytes"}
#: What a request with a key was told.
ANSWER = '{"name": "\N{EURO SIGN}"}'
#: Nullable columns whose value would change the job's state.
EMPTY = (
    "phase",
    "worker_id",
    "available_at",
    "lease_expires_at",
    "cancel_requested_at",
    "pause_requested_at",
    "resume_point",
    "ended_at",
    "error_code",
    "error_message",
    "failure_kind",
)

Values = dict[str, Any]


class Stored(NamedTuple):
    """A row as an older version has written it."""

    model: type[SQLModel]
    key: tuple[Any, ...]
    values: Values


def configure(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    config.attributes["connection"] = connection
    return config


def list_old_revisions() -> list[str]:
    """All revisions before the newest, oldest first."""
    script = ScriptDirectory.from_config(configure())
    revisions = [each.revision for each in script.walk_revisions()]
    return revisions[:0:-1]


pytestmark = [
    BOTH_DATABASES,
    pytest.mark.parametrize("revision", list_old_revisions(), indirect=True, scope="module"),
]


def make_value(column: Column[Any], number: int) -> Any:
    """Each column has a different value, so that a swap is noticed."""
    values: dict[type, Any] = {
        bool: True,
        int: number,
        float: number + 0.25,
        str: column.name,
        object: make_json(column.name, number),
        datetime: LONG_AGO + timedelta(seconds=number),
    }
    return values[column.type.python_type]


def make_json(name: str, number: int) -> Any:
    """JSON of the shape that the column has."""
    if name in ("seeds", "rounds", "looks") or "_per_" in name:
        return [number]
    if name == "samples":
        return [{name: number}]
    return {name: number if name == "thresholds" else str(number)}


def make_values(table: Table, **given: Any) -> Values:
    """A row of the table as it was; keyword arguments that it had no column for are dropped."""
    made = {column.name: make_value(column, number) for number, column in enumerate(table.columns)}
    return {name: given.get(name, value) for name, value in made.items()}


def make_config(columns: Collection[str], **settings: Any) -> Values:
    """A configuration as it was before the data had a seed of their own, and before any number of
    grids was allowed; also before the data had versions, if the table's columns are so old."""
    config = TrainingConfig(epochs=3, seed=7, num_samples=100_000, **settings)
    stored = config.model_dump(mode="json", exclude={"data_seed", *EARLIER_VALUES})
    has_versions = "best_likelihood_epoch" in columns or "criteria" in columns
    return stored | EARLIER_VALUES if has_versions else stored


def identify(config: Values) -> str:
    # The hash of the file in place of the name; of a deleted one only the name is known.
    sha256 = hashlib.sha256(b"grids").hexdigest() if config["dataset"] == "mine" else None
    return compute_config_sha256(read_config(config), dataset_sha256=sha256)


def make_job(table: Table, status: JobStatus) -> Values:
    config = make_config(table.columns.keys(), dataset=DATASETS.get(status, "atomic"))
    given: Values = dict.fromkeys(EMPTY) | {
        "id": JOB_IDS[status],
        "option": "b",
        "config": config,
        "config_sha256": identify(config),
        "status": status.value,
        "epochs_completed": 2,
        # PostgreSQL can store a NUL only in JSON.
        "metadata": {"study": "x", "odd": "a\0b"},
    }
    if status is JobStatus.running:
        given |= {"phase": "training", "worker_id": WORKER_ID}
        given["lease_expires_at"] = utc_now() + timedelta(hours=1)
    if status is JobStatus.cancelled:
        given["cancel_requested_at"] = LONG_AGO
    if status is JobStatus.failed:
        given |= {"error_code": "x", "error_message": "because", "failure_kind": "numeric"}
    if status.is_terminal:
        given["ended_at"] = LONG_AGO
    return make_values(table, **given)


def make_study(table: Table) -> Values:
    betas = {"b": 1.0, 'é "2"': 2e-05}
    configs = {name: make_config(table.columns.keys(), beta=beta) for name, beta in betas.items()}
    arms = [
        {"name": name, "option": "b", "config": config, "config_sha256": identify(config)}
        for name, config in configs.items()
    ]
    return make_values(table, id="study", arms=arms)


def make_epoch(table: Table, job_id: str, epoch: int) -> Values:
    lists = {
        f"{split}_{name}": value
        for split in ("train", "val")
        for name, value in {
            "recall_per_colour": [0.5, None],
            "kl_per_dimension": [0.5, epoch],
            "information_per_dimension": [0.25, epoch],
        }.items()
    }
    given = lists | {"job_id": job_id, "epoch": epoch, "max_spike_ratio": None}
    return make_values(table, **given)


def make_rows(tables: Mapping[str, Table]) -> Iterator[tuple[type[SQLModel], Values]]:
    """A worker, a study, and a job in each status with two epochs and what belongs to them."""
    yield Worker, make_values(tables["worker"], id=WORKER_ID, state="busy")
    if "study" in tables:
        yield Study, make_study(tables["study"])
    if "idempotency_key" in tables:
        yield IdempotencyKey, make_values(tables["idempotency_key"], answer=ANSWER)
    for status, job_id in JOB_IDS.items():
        yield Job, make_job(tables["job"], status)
        if "job_label" in tables:
            yield JobLabel, make_values(tables["job_label"], job_id=job_id, key="study", value="x")
        for epoch in (1, 2):
            yield EpochMetrics, make_epoch(tables["epoch_metrics"], job_id, epoch)
            yield JobEvent, make_values(tables["job_event"], job_id=job_id, kind="epoch")
            checkpoint = {"kind": "checkpoint", "samples": [{"accuracy": 0.5}]}
            given = {"job_id": job_id, "epoch": epoch} | checkpoint
            yield Artifact, make_values(tables["artifact"], **given)


def store(connection: Connection, table: Table, model: type[SQLModel], values: Values) -> Stored:
    if model in (JobEvent, Artifact):
        del values["id"]  # the database counts these itself
    key = connection.execute(insert(table).values(values)).inserted_primary_key
    assert key is not None
    return Stored(model, tuple(key), values)


def fill(connection: Connection) -> list[Stored]:
    metadata = MetaData()
    metadata.reflect(connection)
    return [
        store(connection, metadata.tables[str(model.__tablename__)], model, values)
        for model, values in make_rows(metadata.tables)
    ]


class Original(NamedTuple):
    """A database as an older version leaves it, to be copied, and what it has stored there."""

    settings: Settings
    rows: list[Stored]


@pytest.fixture(scope="module")
def revision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory,
    database: str,
    revision: str,
    request: pytest.FixtureRequest,
) -> Original:
    url = ""
    if database == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.create_database()
    settings = Settings(data_dir=tmp_path_factory.mktemp("original"), database_url=url)
    engine = create_engine(settings.resolved_database_url)
    with engine.begin() as connection:
        command.upgrade(configure(connection), revision)
        rows = fill(connection)
    engine.dispose()
    return Original(settings, rows)


@pytest.fixture
def settings(
    tmp_path: Path, database: str, original: Original, request: pytest.FixtureRequest
) -> Settings:
    """Settings with a copy of the original."""
    url = original.settings.database_url
    if database == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.create_database(template=url)
    else:
        shutil.copy(original.settings.data_dir / "losslab.db", tmp_path)
    settings = Settings(data_dir=tmp_path, database_url=url)
    settings.datasets_dir.mkdir()
    (settings.datasets_dir / "mine.npz").write_bytes(b"grids")
    return settings


@pytest.fixture
def stored(original: Original, settings: Settings) -> list[Stored]:
    """What the older version leaves behind."""
    return original.rows


@pytest.fixture
def engine(stored: list[Stored], settings: Settings) -> Iterator[Engine]:
    """The database after the upgrade."""
    engine = open_database(settings)
    yield engine
    engine.dispose()


def read_row(session: Session, row: Stored) -> Values:
    """The same row by the names of its columns today."""
    found = session.get_one(row.model, row.key)
    mapper = inspect(row.model)
    return {
        column.name: getattr(found, mapper.get_property_by_column(column).key)
        for column in mapper.columns
    }


def upgraded(row: Stored) -> Values:
    """The row's values, its configurations with the settings that came later."""
    values = dict(row.values)
    if row.model is Job:
        values["config"] = EARLIER_VALUES | values["config"]
    if row.model is Study:
        values["arms"] = [
            arm | {"config": EARLIER_VALUES | arm["config"]} for arm in values["arms"]
        ]
    return values


def test_upgrade_keeps_every_row_and_value(stored: list[Stored], engine: Engine) -> None:
    with Session(engine) as session:
        for row in stored:
            now = read_row(session, row)
            kept = {name: value for name, value in upgraded(row).items() if name in now}
            assert {name: now[name] for name in kept} == kept
        for model in {row.model for row in stored}:
            num_rows = session.exec(select(func.count()).select_from(model)).one()
            assert num_rows == sum(row.model is model for row in stored)


def test_columns_that_came_later_are_as_in_a_new_row(stored: list[Stored], engine: Engine) -> None:
    with Session(engine) as session:
        for row in stored:
            made = row.model()
            later = read_row(session, row).keys() - row.values.keys() - COMPUTED
            for name in later:
                assert read_row(session, row)[name] == getattr(made, name), name


def test_upgrade_counts_the_bytes_of_kept_answers(stored: list[Stored], engine: Engine) -> None:
    with Session(engine) as session:
        found = session.exec(select(IdempotencyKey.num_bytes)).all()
    kept = [row.values for row in stored if row.model is IdempotencyKey]
    assert found == [values.get("num_bytes", len(ANSWER.encode())) for values in kept]


def test_upgrade_gives_every_job_the_identity_of_its_configuration(
    stored: list[Stored], engine: Engine
) -> None:
    with Session(engine) as session:
        jobs = {job.id: job for job in session.exec(select(Job))}
    for status, job_id in JOB_IDS.items():
        assert jobs[job_id].config_sha256 == identify(jobs[job_id].config), status
    assert len({job.config_sha256 for job in jobs.values()}) == 1 + len(DATASETS)


def test_upgraded_job_has_the_data_it_always_had(stored: list[Stored], engine: Engine) -> None:
    with Session(engine) as session:
        for job in session.exec(select(Job)):
            assert "data_seed" not in job.config
            assert (job.training_config.seed, job.training_config.data_seed) == (7, 7)
            assert (job.config["generator"], job.training_config.generator) == (1, 1)
            assert isinstance(job.config["beta"], float)


def test_new_job_like_an_older_one_shares_its_identity(
    stored: list[Stored], client: TestClient
) -> None:
    body = {"option": "a", "epochs": 3, "seed": 8}
    older = client.get(f"/jobs/{JOB_IDS[JobStatus.queued]}").raise_for_status().json()
    like_it = client.post("/jobs", json=body | {"generator": 1}).raise_for_status().json()
    assert like_it["config_sha256"] == older["config_sha256"]
    on_new_data = client.post("/jobs", json=body).raise_for_status().json()
    assert on_new_data["config_sha256"] != older["config_sha256"]


def test_arms_of_an_older_study_keep_their_data_and_identity(
    stored: list[Stored], engine: Engine
) -> None:
    with Session(engine) as session:
        arms = [arm for study in session.exec(select(Study)) for arm in study.arm_list]
    assert len(arms) == 2 * any(row.model is Study for row in stored)
    for arm in arms:
        config = TrainingConfig.model_validate(arm.config)
        assert config.generator == 1
        assert compute_config_sha256(config) == arm.config_sha256


def test_upgrade_of_many_different_jobs_takes_no_more_statements(
    stored: list[Stored], settings: Settings
) -> None:
    job = next(row.values for row in stored if row.model is Job)
    configs = [make_config(job.keys(), beta=2 + number) for number in range(NUM_MANY)]
    given = [
        {"id": f"copy{number}", "config": config, "config_sha256": identify(config)}
        for number, config in enumerate(configs)
    ]
    copies = [job | {name: each[name] for name in each.keys() & job.keys()} for each in given]
    engine = create_engine(settings.resolved_database_url)
    with engine.begin() as connection:
        connection.execute(insert(Table("job", MetaData(), autoload_with=connection)), copies)
    with engine.begin() as connection, recording(connection) as statements:
        upgrade(connection, revision="head", datasets_dir=settings.datasets_dir)
    with Session(engine) as session:
        num_identities = len(set(session.exec(select(Job.config_sha256))))
    engine.dispose()
    assert num_identities == NUM_MANY + 1 + len(DATASETS)
    assert len(statements) < NUM_MANY / 2


def test_upgraded_schema_is_that_of_the_models(stored: list[Stored], engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []


def test_queued_job_is_claimed_after_the_upgrade(stored: list[Stored], engine: Engine) -> None:
    job = queue.claim(engine, worker_id="new", lease_seconds=30)
    assert job is not None
    assert job.id == JOB_IDS[JobStatus.queued]
    queue.finish(engine, Lease(job.id, job.attempt, "new"), test_metrics={})
    assert queue.claim(engine, worker_id="new", lease_seconds=30) is None


def test_running_job_stays_with_its_worker_during_the_upgrade(
    stored: list[Stored], settings: Settings, engine: Engine
) -> None:
    assert Reaper(engine, settings=settings).reap() == 0
    with Session(engine) as session:
        job = session.get_one(Job, JOB_IDS[JobStatus.running])
    lease = Lease(job.id, job.attempt, WORKER_ID)
    leases.heartbeat(engine, lease, lease_seconds=30, progress=1.0)
    queue.finish(engine, lease, test_metrics={})


@pytest.mark.parametrize("status", [JobStatus.paused, JobStatus.failed, JobStatus.cancelled])
def test_stopped_job_is_resumed_after_the_upgrade(
    stored: list[Stored], engine: Engine, status: JobStatus
) -> None:
    queue.resume(engine, JOB_IDS[status])
    job = queue.claim(engine, worker_id="new", lease_seconds=30, job_id=JOB_IDS[status])
    assert job is not None
    assert job.epochs_completed == 2


def test_job_is_removed_with_all_its_rows_after_the_upgrade(
    stored: list[Stored], engine: Engine
) -> None:
    job_id = JOB_IDS[JobStatus.succeeded]
    queue.remove(engine, job_id)
    with Session(engine) as session:
        for model in (EpochMetrics, JobEvent, Artifact):
            assert session.exec(select(model).where(model.job_id == job_id)).all() == []


def test_labels_of_older_jobs_find_them_after_the_upgrade(
    stored: list[Stored], client: TestClient
) -> None:
    found = client.get("/jobs", params={"metadata[study]": "x"}).raise_for_status().json()["data"]
    assert {job["id"] for job in found} == set(JOB_IDS.values())


def test_api_shows_what_an_older_version_has_stored(
    stored: list[Stored], client: TestClient
) -> None:
    listed = client.get("/jobs").raise_for_status().json()["data"]
    assert {job["id"] for job in listed} == set(JOB_IDS.values())
    for job_id in JOB_IDS.values():
        for path in ("", "/metrics", "/events"):
            client.get(f"/jobs/{job_id}{path}").raise_for_status()
    workers = client.get("/workers").raise_for_status().json()["data"]
    assert [worker["id"] for worker in workers] == [WORKER_ID]
