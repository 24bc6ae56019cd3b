"""The list of workers and their states."""

from datetime import timedelta

import pytest
from conftest import BOTH_DATABASES, SubmitJob, open_client
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update
from sqlmodel import Session

from server.database.engine import write_transaction
from server.jobs import leases, queue, workers
from server.jobs.ages import AgeWatch
from server.jobs.leases import Lease
from server.models.columns import utc_now
from server.models.tables import Job, Worker, WorkerState
from server.settings import Settings

LIMITS = {"heartbeat_seconds": 5.0, "lease_seconds": 30.0, "stall_seconds": 300.0}
NAME = "host-3/1234"


def make_worker(worker_id: str) -> Worker:
    host, pid = worker_id.split("/")
    worker = Worker(
        id=worker_id, host=host, pid=int(pid), device="cpu", version="0.1", torch_version="2.13"
    )
    worker.state = WorkerState.idle
    return worker


def enter(engine: Engine, worker_id: str = NAME) -> None:
    workers.register(engine, make_worker(worker_id))


def enter_silent(engine: Engine, seconds: float, worker_id: str = NAME) -> None:
    """A worker whose last heartbeat was already so long ago when anybody saw it first."""
    worker = make_worker(worker_id)
    worker.heartbeat_at = utc_now() - timedelta(seconds=seconds)
    with write_transaction(engine) as session:
        session.add(worker)


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
    app: FastAPI, engine: Engine, seconds: float, state: str
) -> None:
    enter_silent(engine, seconds)
    with open_client(app) as client:
        assert read_workers(client) == {NAME: state}
        num_live = client.get("/readyz").json()["num_workers"]
    assert num_live == (0 if state == "dead" else 1)


@pytest.mark.parametrize(("seconds", "state"), [(0, "busy"), (280, "busy"), (320, "stalled")])
def test_worker_that_lives_without_progress_is_stalled(
    app: FastAPI, engine: Engine, submit_job: SubmitJob, seconds: float, state: str
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
    with open_client(app) as client:
        (worker,) = client.get("/workers").json()["data"]
    assert (worker["state"], worker["job_id"]) == (state, job.id)


def test_worker_is_busy_from_its_claim_on(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    enter(engine)
    job = submit_job()
    queue.claim(engine, worker_id=NAME, lease_seconds=30)
    (worker,) = client.get("/workers").json()["data"]
    assert (worker["state"], worker["job_id"]) == ("busy", job.id)


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
    enter_silent(engine, 2 * 24 * 3600, "old/1")
    enter(engine, "new/2")
    assert read_workers(client) == {"new/2": "idle"}


def test_workers_are_shown_with_device_and_versions(client: TestClient, engine: Engine) -> None:
    enter(engine)
    (worker,) = client.get("/workers").json()["data"]
    assert (worker["device"], worker["torch_version"]) == ("cpu", "2.13")
    assert worker["heartbeat_at"].endswith("Z")


class Clock:
    """A clock that is never set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Watcher:
    """A server that looks at the workers every few seconds."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = Clock()
        self._watch = AgeWatch(clock=self._clock)

    def look_for(self, seconds: float) -> None:
        end = self._clock.now + seconds
        while self._clock.now < end:
            with Session(self._engine) as session:
                workers.watch_times(session, self._watch)
            self._clock.now += 5.0

    def read_states(self) -> list[str]:
        with Session(self._engine) as session:
            limit, watch, settings = 10, self._watch, self._settings
            found = workers.list_workers(session, settings=settings, limit=limit, watch=watch)
            num_live = workers.count_live(session, lease_seconds=30, watch=watch)
        assert num_live == sum(report.state != "dead" for report in found)
        return [report.state for report in found]


def test_clock_that_is_set_right_after_a_worker_came_does_not_make_it_dead(
    engine: Engine, settings: Settings
) -> None:
    watcher = Watcher(engine, settings)
    watcher.look_for(5)
    enter_silent(engine, 3 * 3600)
    assert watcher.read_states() == ["idle"]
    watcher.look_for(25)
    assert watcher.read_states() == ["stale"]
    watcher.look_for(10)
    assert watcher.read_states() == ["dead"]


@pytest.mark.parametrize("hours", [3, -3])
def test_clock_that_is_set_makes_no_living_worker_dead_and_no_dead_one_alive(
    engine: Engine, settings: Settings, hours: float
) -> None:
    enter(engine)
    watcher = Watcher(engine, settings)
    watcher.look_for(5)
    make_silent(engine, hours * 3600)
    watcher.look_for(5)
    assert watcher.read_states() == ["idle"]
    watcher.look_for(15)
    assert watcher.read_states() == ["stale"]
    watcher.look_for(15)
    assert watcher.read_states() == ["dead"]


def test_clock_that_is_set_makes_no_job_stalled(
    engine: Engine, settings: Settings, submit_job: SubmitJob
) -> None:
    enter(engine)
    job = submit_job()
    claimed = queue.claim(engine, worker_id=NAME, lease_seconds=30)
    assert claimed is not None
    lease = Lease(job.id, claimed.attempt, NAME)
    leases.heartbeat(engine, lease, lease_seconds=30, progress=0.1)
    watcher = Watcher(engine, settings)
    watcher.look_for(5)
    with engine.begin() as connection:
        connection.execute(update(Job).values(progress_at=utc_now() - timedelta(hours=3)))
    leases.heartbeat(engine, lease, lease_seconds=30, progress=0.1)
    watcher.look_for(5)
    assert watcher.read_states() == ["busy"]


def test_living_worker_that_was_deleted_as_too_old_is_listed_again(
    client: TestClient, engine: Engine
) -> None:
    living = Worker(id="living/1", host="living", pid=1, device="cpu", state=WorkerState.idle)
    workers.register(engine, living)
    make_silent(engine, 2 * 24 * 3600)
    enter(engine, "new/2")
    workers.report_idle(engine, living)
    assert read_workers(client) == {"new/2": "idle", "living/1": "idle"}


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
