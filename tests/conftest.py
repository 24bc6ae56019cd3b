"""Real databases, tiny real trainings, a real server; no mocks of our own code."""

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from postgres import Postgres
from schedule import GroupScheduling, sort_groups
from sqlalchemy import Engine
from sqlmodel import Session, col, select
from xdist.remote import Producer

from server.database.engine import open_database, write_transaction
from server.jobs.admission import Admission
from server.jobs.submission import new_job
from server.jobs.submission import submit_job as submit_job_in
from server.main import create_app
from server.models.configuration import TrainingConfig, resolve_config
from server.models.epochs import EpochMetrics
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Artifact, Job
from server.settings import Settings
from worker.main import work

TINY = {"num_samples": 200, "epochs": 2, "batch_size": 32, "checkpoint_every": 1}
#: With these thresholds a run passes every criterion unless all of its output is black.
LENIENT = {
    "min_accuracy": 0,
    "max_accuracy": 1,
    "min_foreground_recall": 0,
    "max_all_black_share": 1,
    "min_kl_per_dimension": 0,
    "loss_tolerance": 10,
    "max_accuracy_change": 1,
    "max_loss_rise": 10,
    "max_spike_ratio": 1000,
}

# Test processes run in parallel; more threads than cores would mostly wait for each other.
torch.set_num_threads(1)
# As in a worker: imported objects are never garbage, and each job ends with a collection.
gc.freeze()
# A busy machine is slow, and no test is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SubmitJob = Callable[..., Job]
MakeSettings = Callable[..., Settings]


#: A module's tests run on both databases with `pytestmark = BOTH_DATABASES`.
BOTH_DATABASES = pytest.mark.parametrize(
    "database", ["sqlite", "postgresql"], indirect=True, scope="session"
)


@pytest.hookimpl(trylast=True)  # pytest itself puts together what runs on one database
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sort_groups(items)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> GroupScheduling:
    config.option.loadscopereorder = False
    return GroupScheduling(config, log)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="session")
def migrated_url(postgres: Postgres) -> str:
    """A PostgreSQL database with the schema, to be copied."""
    url = postgres.create_database()
    open_database(Settings(database_url=url)).dispose()
    return url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with the schema, to be copied."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("migrated"), database_url="")
    open_database(settings).dispose()
    return settings.data_dir / "losslab.db"


@pytest.fixture(scope="session")
def database(request: pytest.FixtureRequest) -> str:
    """Which database the tests run on; SQLite unless the module says otherwise."""
    return getattr(request, "param", "sqlite")


@pytest.fixture(scope="session")
def make_settings(request: pytest.FixtureRequest, database: str) -> MakeSettings:
    """Settings with a data directory and an empty database of their own."""

    def make(data_dir: Path, **overrides: Any) -> Settings:
        url = ""
        if database == "postgresql":
            postgres: Postgres = request.getfixturevalue("postgres")
            url = postgres.create_database(template=request.getfixturevalue("migrated_url"))
        else:
            data_dir.mkdir(parents=True, exist_ok=True)
            shutil.copy(request.getfixturevalue("migrated_file"), data_dir / "losslab.db")
        return Settings(data_dir=data_dir, database_url=url, **{"poll_seconds": 0.02} | overrides)

    return make


@pytest.fixture
def settings(tmp_path: Path, make_settings: MakeSettings) -> Settings:
    return make_settings(tmp_path / "experiments", retry_seconds=0.1)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def submit_job(engine: Engine) -> SubmitJob:
    """Queue a tiny job; keyword arguments override its configuration."""

    def submit(option: str = "b", *, priority: int = 0, **overrides: Any) -> Job:
        config = resolve_config(OPTIONS[BuiltInOption(option)].config, overrides=TINY | overrides)
        return queue_job(engine, option=BuiltInOption(option), config=config, priority=priority)

    return submit


def queue_job(
    engine: Engine,
    *,
    config: TrainingConfig,
    max_queued_jobs: int | None = None,
    reserved_seconds: float = 0.0,
    **values: Any,
) -> Job:
    """Queue a job in a transaction of its own."""
    with write_transaction(engine) as session:
        return submit_job_in(
            session,
            new_job(config, **values),
            admission=None if max_queued_jobs is None else Admission(Path(), max_queued_jobs),
            reserved_seconds=reserved_seconds,
        )


def read(engine: Engine, job: Job) -> Job:
    with Session(engine) as session:
        return session.exec(select(Job).where(Job.id == job.id)).one()


def read_rows(engine: Engine, job: Job) -> list[EpochMetrics]:
    with Session(engine) as session:
        rows = select(EpochMetrics).where(EpochMetrics.job_id == job.id)
        return list(session.exec(rows.order_by(col(EpochMetrics.epoch))))


def read_artifacts(engine: Engine, job: Job) -> list[Artifact]:
    with Session(engine) as session:
        return list(session.exec(select(Artifact).where(Artifact.job_id == job.id)))


def numbers(row: EpochMetrics) -> dict[str, object]:
    """An epoch's metrics, without times and speed."""
    measured = row.model_dump()
    for key in ("job_id", "attempt", "recorded_at", "seconds", "grids_per_second"):
        del measured[key]
    return measured


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


def open_client(app: FastAPI) -> TestClient:
    """A client with this machine's own host name."""
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with open_client(app) as client:
        yield client


def problem(response: Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail", "instance"} <= body.keys()
    return body


@pytest.fixture
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A user's mistake must not be logged as an error of the server."""
    yield
    assert [record for record in caplog.get_records("call") if record.exc_info] == []


def drain(settings: Settings, engine: Engine) -> None:
    """Run every queued job in this process."""
    work(settings, engine=engine, shutdown=threading.Event(), is_drain=True)


def copy_settings(original: Settings, data_dir: Path) -> Settings:
    """Settings with a copy of a data directory and its SQLite database."""
    shutil.copytree(original.data_dir, data_dir)
    return original.model_copy(update={"data_dir": data_dir})


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings
) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """A server on which options a, b and c have run, and their ids by option."""
    settings = make_settings(tmp_path_factory.mktemp("finished") / "experiments")
    with open_client(create_app(settings)) as client:
        ids = {
            option: client.post("/jobs", json={"option": option, "name": f"run {option}", **TINY})
            .raise_for_status()
            .json()["id"]
            for option in "abc"
        }
        engine = open_database(settings)
        drain(settings, engine)
        engine.dispose()
        yield client, ids


@pytest.fixture
def write_npz(settings: Settings) -> Callable[..., str]:
    """Write arrays to the data directory's datasets/ and return the data set's name."""

    def write(name: str = "mine", **arrays: np.ndarray) -> str:
        settings.datasets_dir.mkdir(parents=True, exist_ok=True)
        np.savez(settings.datasets_dir / f"{name}.npz", **arrays)
        return name

    return write
