"""Jobs survive a database that crashes or is full, and a full disk."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import forks
import httpx
import psycopg
import pytest
from conftest import numbers, open_client, queue_job, read, read_artifacts, read_rows
from fault_worker import QUICK, SHORT_JOB, WorkerProcess, run_worker, wait_for
from httpx2 import Response
from postgres import Postgres
from service import Service
from sqlalchemy import Engine

from server.database.engine import open_database
from server.files.artifacts import JobFiles
from server.files.hashes import compute_sha256
from server.main import create_app
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import FailureKind, Job, JobStatus
from server.settings import Settings

pytestmark = pytest.mark.slow

OUTAGE_SECONDS = 3.0
TRIES_AGAIN = re.compile("(Retrying|will be tried again).*database or disk is full")

OpenSettings = Callable[..., Settings]


def submit(engine: Engine, **overrides: object) -> Job:
    config = resolve_config(
        OPTIONS[BuiltInOption.b].config,
        quick_test=False,
        overrides=SHORT_JOB | {"checkpoint_every": 1} | overrides,
    )
    return queue_job(engine, option=BuiltInOption.b, config=config)


def read_numbers(engine: Engine, job: Job) -> list[dict[str, object]]:
    return [numbers(row) for row in read_rows(engine, job)]


@contextmanager
def opened(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings)
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The metrics of an undisturbed job."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("reference"), **QUICK)
    with opened(settings) as engine:
        job = submit(engine)
        assert run_worker(settings, "--drain") == 0
        return read_numbers(engine, job)


@pytest.fixture(scope="module")
def fragile_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for crashes, separate from that of other tests."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture
def postgres_settings(tmp_path: Path, fragile_postgres: Postgres) -> OpenSettings:
    """Settings with a database that keeps what it has committed, as a real one would."""

    def open_settings(**overrides: float) -> Settings:
        url = fragile_postgres.create_database()
        with psycopg.connect(url, autocommit=True) as connection:
            name = connection.info.dbname
            connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = on".encode())
        return Settings(data_dir=tmp_path, database_url=url, **QUICK | overrides)

    return open_settings


@contextmanager
def crashed(postgres: Postgres) -> Iterator[None]:
    postgres.stop(signal.SIGQUIT)
    try:
        yield
    finally:
        postgres.start()


@contextmanager
def tmpfs(path: Path, *, megabytes: int) -> Iterator[None]:
    """A disk of that size at the path; only root may mount one."""
    path.mkdir(parents=True)
    mounted = mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


def assert_problem(response: Response, *, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status


def assert_succeeded(
    settings: Settings, engine: Engine, job: Job, *, reference: list[dict[str, object]]
) -> None:
    ended = read(engine, job)
    assert ended.status is JobStatus.succeeded, ended.error_message
    assert read_numbers(engine, job) == reference
    assert_files_verify(settings, engine, job)


def assert_files_verify(settings: Settings, engine: Engine, job: Job) -> None:
    files = JobFiles(settings.runs_dir, job.id)
    for artifact in read_artifacts(engine, job):
        assert compute_sha256(files.path(artifact.file_name)) == artifact.sha256


@pytest.mark.parametrize("lease_seconds", [10 * OUTAGE_SECONDS, OUTAGE_SECONDS / 2])
def test_job_outlasts_a_crash_of_its_database_shorter_or_longer_than_its_lease(
    fragile_postgres: Postgres,
    postgres_settings: OpenSettings,
    reference: list[dict[str, object]],
    lease_seconds: float,
) -> None:
    settings = postgres_settings(lease_seconds=lease_seconds)
    with opened(settings) as engine:
        job = submit(engine)
        with WorkerProcess(settings, "--drain", point="paced") as process:
            wait_for(lambda: read(engine, job).resume_point)
            with crashed(fragile_postgres):
                time.sleep(OUTAGE_SECONDS)
            assert process.wait() == 0, process.log
        assert_succeeded(settings, engine, job, reference=reference)


def test_server_says_that_its_database_is_away_and_comes_back_with_it(
    fragile_postgres: Postgres, postgres_settings: OpenSettings
) -> None:
    app = create_app(postgres_settings())
    with open_client(app) as client:
        assert client.get("/jobs").status_code == 200
        with crashed(fragile_postgres):
            assert_problem(client.get("/jobs"), status=503)
        assert client.get("/jobs").status_code == 200


def test_worker_that_freezes_inside_a_transaction_does_not_keep_its_job(
    postgres_settings: OpenSettings, reference: list[dict[str, object]]
) -> None:
    settings = postgres_settings()
    with opened(settings) as engine:
        job = submit(engine)
        with WorkerProcess(settings, "--job", job.id, point="frozen_transaction") as frozen:
            frozen.wait_until_frozen()
            with WorkerProcess(settings):
                wait_for(lambda: read(engine, job).status is JobStatus.succeeded)
            frozen.thaw()
            assert frozen.wait() == 0, frozen.log
            assert re.search("taken from worker|belongs to another worker", frozen.log)
        assert_succeeded(settings, engine, job, reference=reference)


def test_full_disk_costs_one_attempt_of_one_job_and_all_go_on_once_there_is_room(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    settings = Settings(data_dir=tmp_path, **QUICK)
    with tmpfs(settings.runs_dir, megabytes=100), opened(settings) as engine:
        jobs = [submit(engine) for _ in range(3)]
        with WorkerProcess(settings, point="paced") as process:
            wait_for(lambda: read(engine, jobs[0]).epochs_completed)
            with ballast(settings.runs_dir / "ballast"):
                wait_for(lambda: "no job is claimed until" in process.log)
                time.sleep(1.0)  # in which the worker could claim and lose many
                assert_waiting_for_room(settings, engine, jobs)
            for job in jobs:
                wait_for(lambda job=job: read(engine, job).status is JobStatus.succeeded)  # type: ignore[misc]
        assert "there is room" in process.log
        for job in jobs:
            assert_succeeded(settings, engine, job, reference=reference)


def assert_waiting_for_room(settings: Settings, engine: Engine, jobs: list[Job]) -> None:
    first, *others = (read(engine, job) for job in jobs)
    assert (first.status, first.attempt, first.num_lost_attempts) == (JobStatus.queued, 1, 1)
    assert [(job.status, job.attempt) for job in others] == [(JobStatus.queued, 0)] * 2
    assert_files_verify(settings, engine, first)
    folder = JobFiles(settings.runs_dir, first.id).checkpoints_dir
    assert [path.name for path in folder.glob(".*")] == []


def test_read_only_disk_costs_no_attempt(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, **QUICK)
    with tmpfs(settings.runs_dir, megabytes=100), opened(settings) as engine:
        jobs = [submit(engine) for _ in range(3)]
        assert mount("-o", "remount,ro", str(settings.runs_dir)).returncode == 0
        with WorkerProcess(settings, "--drain") as process:
            assert process.wait() == 1
            assert f"{settings.runs_dir}: it is on a read-only file system" in process.log
        assert [read(engine, job).attempt for job in jobs] == [0, 0, 0]


def test_disk_that_becomes_read_only_under_a_worker_costs_one_attempt_of_one_job(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    settings = Settings(data_dir=tmp_path, **QUICK)
    disk = str(settings.runs_dir)
    with (
        tmpfs(settings.runs_dir, megabytes=100),
        opened(settings) as engine,
        WorkerProcess(settings) as process,
    ):
        wait_for(lambda: "waits for jobs" in process.log)
        assert mount("-o", "remount,ro", disk).returncode == 0
        jobs = [submit(engine) for _ in range(3)]
        wait_for(lambda: "no job is claimed until user" in process.log)
        time.sleep(1.0)  # in which the worker could claim and lose many
        assert_waiting_for_room(settings, engine, jobs)
        assert mount("-o", "remount,rw", disk).returncode == 0
        for job in jobs:
            wait_for(lambda job=job: read(engine, job).status is JobStatus.succeeded)  # type: ignore[misc]
            assert_succeeded(settings, engine, job, reference=reference)


def test_draining_worker_without_room_says_so_and_ends(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, **QUICK)
    with tmpfs(settings.runs_dir, megabytes=20), opened(settings) as engine:
        job = submit(engine)
        with WorkerProcess(settings, "--drain") as process:
            assert process.wait() == 1
            assert "none is claimed until 32 MiB are free" in process.log
        assert read(engine, job).attempt == 0


def test_job_that_was_asked_for_by_its_name_says_that_the_disk_is_full(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, **QUICK | {"checkpoint_seconds": 1000})
    # A checkpoint is 9.5 MB, so without other resume points the third one does not fit.
    with tmpfs(settings.runs_dir, megabytes=24), opened(settings) as engine:
        job = submit(engine)
        assert run_worker(settings, "--job", job.id) == 0
        failed = read(engine, job)
        assert (failed.status, failed.error_code) == (JobStatus.failed, "disk_full")
        assert failed.failure_kind is FailureKind.infrastructure
        assert [row.epoch for row in read_rows(engine, failed)] == [1, 2]
        assert_files_verify(settings, engine, failed)


def test_full_database_refuses_new_jobs_and_keeps_the_one_that_runs(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    disk = tmp_path / "database"
    url = f"sqlite:///{disk / 'losslab.db'}"
    settings = Settings(data_dir=tmp_path / "data", database_url=url, **QUICK)
    with (
        tmpfs(disk, megabytes=8),
        open_client(create_app(settings)) as client,
        opened(settings) as engine,
    ):
        job = submit(engine)
        with WorkerProcess(settings, "--drain", point="paced") as process:
            wait_for(lambda: read(engine, job).resume_point)
            with ballast(disk / "ballast"):
                assert_problem(client.post("/jobs", json={"option": "b"}), status=503)
                wait_for(lambda: TRIES_AGAIN.search(process.log))
                assert client.get(f"/jobs/{job.id}").json()["status"] == "running"
            assert process.wait() == 0, process.log
        assert [other["id"] for other in client.get("/jobs").json()["data"]] == [job.id]
        assert_succeeded(settings, engine, job, reference=reference)


@contextmanager
def ballast(path: Path) -> Iterator[None]:
    """Fill the path's disk."""
    with closing(os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY), "wb", buffering=0)) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    try:
        yield
    finally:
        path.unlink()


def test_server_that_starts_while_its_database_is_away_waits_for_it(
    tmp_path: Path, fragile_postgres: Postgres, postgres_settings: OpenSettings
) -> None:
    environment = {"LOSSLAB_DATABASE_URL": postgres_settings().database_url}
    service = Service(tmp_path, environment=environment, log_path=tmp_path / "log")
    try:
        with crashed(fragile_postgres):
            service.start("server")
            assert httpx.get(f"{service.url}/metrics").status_code == 200
            assert httpx.get(f"{service.url}/").status_code == 503
            for method in ("GET", "POST"):
                answer = httpx.request(method, f"{service.url}/jobs")
                assert answer.headers["content-type"] == "application/problem+json"
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            ready = httpx.get(f"{service.url}/readyz")
            assert (ready.status_code, ready.json()["database"]) == (503, False)
            assert "wait for it" in (tmp_path / "log").read_text()
        wait_for(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)
        assert httpx.post(f"{service.url}/jobs", json={"option": "b"}).status_code == 201
    finally:
        service.stop("server")


@pytest.mark.parametrize(("part", "other"), [("losslab@", "nobody@"), ("/losslab_", "/nowhere_")])
def test_server_whose_database_refuses_it_ends_with_a_line(
    tmp_path: Path, postgres_settings: OpenSettings, part: str, other: str
) -> None:
    url = postgres_settings().database_url.replace(part, other)
    with (tmp_path / "log").open("wb") as log:
        process = forks.start(
            "losslab",
            *("serve", "--port", "0"),
            environment=os.environ | {"LOSSLAB_DATABASE_URL": url},
            stdout=log,
            stderr=log,
        )
    assert process.wait(timeout=60) == 1
    text = (tmp_path / "log").read_text()
    assert "does not exist" in text
    assert "Traceback" not in text


def test_worker_that_starts_while_its_database_is_away_waits_for_it(
    fragile_postgres: Postgres,
    postgres_settings: OpenSettings,
    reference: list[dict[str, object]],
) -> None:
    settings = postgres_settings()
    with opened(settings) as engine:
        job = submit(engine)
        fragile_postgres.stop(signal.SIGQUIT)
        with WorkerProcess(settings, "--drain") as process:
            wait_for(lambda: "Retrying" in process.log)
            fragile_postgres.start()
            assert process.wait() == 0, process.log
        assert_succeeded(settings, engine, job, reference=reference)


def test_worker_that_is_stopped_while_it_waits_for_its_database_ends_as_any_other(
    fragile_postgres: Postgres, postgres_settings: OpenSettings
) -> None:
    settings = postgres_settings()
    with crashed(fragile_postgres), WorkerProcess(settings) as process:
        wait_for(lambda: "Retrying" in process.log)
        process.terminate()
        assert process.wait() == 0, process.log
        assert "Traceback" not in process.log
