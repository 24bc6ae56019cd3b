"""The list of workers and their states."""

from datetime import timedelta

import pytest
from conftest import BOTH_DATABASES, SubmitJob
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update

from server.jobs import leases, queue, workers
from server.jobs.leases import Lease
from server.models.columns import utc_now
from server.models.tables import Job, Worker, WorkerState
from server.settings import Settings

LIMITS = {"heartbeat_seconds": 5.0, "lease_seconds": 30.0, "stall_seconds": 300.0}
NAME = "host-3/1234"


def enter(engine: Engine, worker_id: str = NAME) -> None:
    host, pid = worker_id.split("/")
    worker = Worker(
        id=worker_id, host=host, pid=int(pid), device="cpu", version="0.1", torch_version="2.13"
    )
    worker.state = WorkerState.idle
    workers.register(engine, worker)


def make_silent(engine: Engine, seconds: float) -> None:
    """Set the last heartbeat to this many seconds ago."""
    with engine.begin() as connection:
        silent_since = utc_now() - timedelta(seconds=seconds)
        connection.execute(update(Worker).values(heartbeat_at=silent_since))


def read_workers(client: TestClient) -> dict[str, str]:
    listed = client.get("/workers").raise_for_status().json()["data"]
    return {worker["id"]: worker["state"] for worker in listed}


pytestmark = BOTH_DATABASES


@pytest.mark.parametrize(
    ("seconds", "state"), [(0, "idle"), (5, "idle"), (15, "stale"), (20, "stale"), (32, "dead")]
)
def test_silent_worker_is_stale_and_then_dead(
    client: TestClient, engine: Engine, seconds: float, state: str
) -> None:
    enter(engine)
    make_silent(engine, seconds)
    assert read_workers(client) == {NAME: state}
    num_live = client.get("/readyz").json()["num_workers"]
    assert num_live == (0 if state == "dead" else 1)


@pytest.mark.parametrize(("seconds", "state"), [(0, "busy"), (280, "busy"), (320, "stalled")])
def test_worker_that_lives_without_progress_is_stalled(
    client: TestClient, engine: Engine, submit_job: SubmitJob, seconds: float, state: str
) -> None:
    enter(engine)
    job = submit_job()
    claimed = queue.claim(engine, worker_id=NAME, lease_seconds=30)
    assert claimed is not None
    lease = Lease(job.id, claimed.attempt, NAME)
    leases.heartbeat(engine, lease, lease_seconds=30, progress=0.1)
    with engine.begin() as connection:
        since = utc_now() - timedelta(seconds=seconds)
        connection.execute(update(Job).values(progress_at=since))
    leases.heartbeat(engine, lease, lease_seconds=30, progress=0.1)
    (worker,) = client.get("/workers").json()["data"]
    assert (worker["state"], worker["job_id"]) == (state, job.id)


def test_worker_that_reported_its_end_is_stopped_however_long_ago(
    client: TestClient, engine: Engine
) -> None:
    enter(engine)
    workers.report_stopped(engine, NAME)
    make_silent(engine, 3600)
    assert read_workers(client) == {NAME: "stopped"}
    assert client.get("/readyz").json()["num_workers"] == 0


def test_workers_without_a_heartbeat_for_a_day_are_deleted(
    client: TestClient, engine: Engine
) -> None:
    enter(engine, "old/1")
    make_silent(engine, 2 * 24 * 3600)
    enter(engine, "new/2")
    assert read_workers(client) == {"new/2": "idle"}


def test_workers_are_shown_with_device_and_versions(client: TestClient, engine: Engine) -> None:
    enter(engine)
    (worker,) = client.get("/workers").json()["data"]
    assert (worker["device"], worker["torch_version"]) == ("cpu", "2.13")
    assert worker["heartbeat_at"].endswith("Z")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update=LIMITS)


def test_heartbeat_later_than_the_time_that_was_read_has_age_zero(
    client: TestClient, engine: Engine
) -> None:
    enter(engine)
    make_silent(engine, -5)
    metrics = client.get("/metrics").raise_for_status().text
    assert f'losslab_worker_heartbeat_age_seconds{{worker="{NAME}"}} 0.0' in metrics
