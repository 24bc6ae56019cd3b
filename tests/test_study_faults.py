"""Studies with real workers and real servers, of which some are killed."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import BOTH_DATABASES, MakeSettings, open_client
from fastapi.testclient import TestClient
from fault_worker import QUICK, SHORT_JOB, WorkerProcess, wait_for
from service import Service
from sqlalchemy import Engine, func, select
from sqlmodel import Session, col
from study_results import end_seeds, read_job_ids, read_study

from server.database.engine import open_database
from server.jobs import queue
from server.jobs.leases import Lease, LeaseLostError
from server.main import create_app
from server.models.studies import Study, StudyJob
from server.models.tables import Job, JobStatus
from server.settings import Settings

pytestmark = [BOTH_DATABASES, pytest.mark.slow]

Json = dict[str, Any]
#: Twenty arms.
GRID = {"beta": [number / 10 for number in range(20)]}
NUM_JOBS = 400


@pytest.fixture
def settings(tmp_path: Path, make_settings: MakeSettings) -> Settings:
    return make_settings(tmp_path / "experiments", **QUICK)


# -- workers


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with open_client(create_app(settings)) as client:
        yield client


@contextmanager
def workers(settings: Settings, number: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(WorkerProcess(settings))
        yield


def wait_until_it_ended(client: TestClient, study_id: str) -> Json:
    def read() -> Json | None:
        time.sleep(0.3)  # what is read takes longer than a look at a job
        study: Json = client.get(f"/studies/{study_id}").raise_for_status().json()
        return study if JobStatus(study["status"]).is_terminal else None

    found = wait_for(read)
    assert found is not None
    return found


def test_study_is_right_although_a_worker_was_killed_a_job_cancelled_and_seeds_were_added(
    client: TestClient, settings: Settings, engine: Engine
) -> None:
    body = {"options": ["a", "b", "c"], "num_seeds": 3, "config": SHORT_JOB}
    study = client.post("/studies", json=body).raise_for_status().json()
    cancelled = study["arms"][2]["jobs"][2]
    client.post(f"/jobs/{cancelled}/cancel").raise_for_status()
    with WorkerProcess(settings, point="mid_batch") as killed:
        assert killed.wait() == -signal.SIGKILL
    with workers(settings, 2):
        ended = wait_until_it_ended(client, study["id"])
        assert ended["num_by_status"] == {"succeeded": 8, "cancelled": 1}
        assert [look["num_seeds"] for look in ended["looks"]] == [3]
        extended = client.post(f"/studies/{study['id']}/seeds", json={"num": 1})
        assert extended.raise_for_status().json()["looks"] == ended["looks"]
        ended = wait_until_it_ended(client, study["id"])
    assert ended["num_by_status"] == {"succeeded": 11, "cancelled": 1}
    assert [look["num_seeds"] for look in ended["looks"]] == [3, 4]
    assert "Seeds were added later" in ended["recommendation"]["reason"]
    assert [arm["num_judged"] for arm in ended["arms"]] == [4, 4, 3]
    assert [arm["num_missing"] for arm in ended["arms"]] == [0, 0, 1]
    for arm in ended["arms"]:
        check_arm(client, arm)
    with Session(engine) as session:
        attempts = Counter(session.scalars(select(col(Job.attempt))))
    assert attempts == {1: 10, 2: 1, 0: 1}, "the killed job was tried again, the others not"


def check_arm(client: TestClient, arm: Json) -> None:
    """What is said of an arm is what its jobs say of themselves."""
    judged = [seed["job_id"] for seed in arm["seeds"] if seed["has_passed"] is not None]
    verdicts = [client.get(f"/jobs/{job_id}/verdict").json() for job_id in judged]
    outcomes = [verdict["outcome"] == "success" for verdict in verdicts]
    assert [s["has_passed"] for s in arm["seeds"] if s["has_passed"] is not None] == outcomes
    assert arm["num_passed"] == sum(outcomes)
    assert arm["diagnoses"] == Counter(verdict["diagnosis"] for verdict in verdicts)
    for place, criterion in enumerate(arm["criteria"]):
        statuses = [verdict["criteria"][place]["status"] for verdict in verdicts]
        assert criterion["name"] == verdicts[0]["criteria"][place]["name"]
        assert criterion["num_passed"] == statuses.count("passed")


# -- servers


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    service = Service(settings.data_dir)
    service.environment = {
        "LOSSLAB_DATABASE_URL": settings.database_url,
        "LOSSLAB_MAX_QUEUED_JOBS": "100000",
    }
    service.start("server")
    yield service
    service.stop("server")


def kill_while(service: Service, act: Any, *, after_seconds: float) -> None:
    """Kill the server while another thread asks it for something, and start it again."""
    asking = threading.Thread(target=lambda: _ask(act))
    asking.start()
    time.sleep(after_seconds)
    service.stop("server", signal.SIGKILL)
    asking.join()
    service.start("server")


def _ask(act: Any) -> None:
    with suppress(httpx.TransportError):
        act()


def check_all_is_whole(engine: Engine) -> None:
    """Every study has all of its jobs or none, and every job its study."""
    with Session(engine) as session:
        ids = set(session.scalars(select(col(Study.id))))
        links = select(col(StudyJob.study_id), func.count()).group_by(col(StudyJob.study_id))
        jobs = select(col(Job.study_id), func.count()).group_by(col(Job.study_id))
        assert dict(session.execute(links).all()) == dict.fromkeys(ids, NUM_JOBS)
        assert dict(session.execute(jobs).all()) == dict.fromkeys(ids, NUM_JOBS)


@pytest.mark.parametrize("after_seconds", [0.1, 0.6])
def test_study_is_whole_or_not_there_when_the_server_is_killed(
    service: Service, engine: Engine, after_seconds: float
) -> None:
    def post() -> None:
        while True:
            service.post("/studies", options=["b"], grid=GRID, num_seeds=20)

    kill_while(service, post, after_seconds=after_seconds)
    check_all_is_whole(engine)
    service.post("/studies", options=["b"], grid=GRID, num_seeds=20)
    check_all_is_whole(engine)


@pytest.mark.parametrize("after_seconds", [0.05, 0.3])
def test_study_can_be_deleted_again_when_the_server_was_killed(
    service: Service, engine: Engine, settings: Settings, after_seconds: float
) -> None:
    study = service.post("/studies", options=["b"], grid=GRID, num_seeds=20)
    service.post(f"/studies/{study['id']}/cancel")
    for arm in study["arms"]:
        for job_id in arm["jobs"]:
            (settings.runs_dir / job_id).mkdir(parents=True)
    url = f"{service.url}/studies/{study['id']}"
    kill_while(service, lambda: httpx.delete(url, timeout=60), after_seconds=after_seconds)
    assert httpx.delete(url, timeout=60).status_code in (200, 404)
    with Session(engine) as session:
        assert session.scalars(select(func.count()).select_from(Job)).one() == 0
        assert session.scalars(select(func.count()).select_from(StudyJob)).one() == 0
    assert list(settings.runs_dir.iterdir()) == []


def test_race_goes_on_when_the_server_was_killed(service: Service, engine: Engine) -> None:
    study = service.post("/studies", options=["a", "b", "c"], until_decided=True, quick_test=True,
                         config={"epochs": 3})  # fmt: skip
    service.stop("server", signal.SIGKILL)
    end_seeds(engine, study["id"], {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    service.start("server")
    other = Service(service.data_dir, environment=service.environment)
    other.start("server")
    wait_for(lambda: len(read_study(engine, study["id"]).seeds) == 10)
    time.sleep(3)  # three further chances of either server to queue it again
    other.stop("server")
    assert [len(read_job_ids(engine, study["id"], arm)) for arm in range(3)] == [5, 10, 10]


def test_cancelling_a_study_and_finishing_its_jobs_do_not_wait_for_each_other(
    settings: Settings, engine: Engine, client: TestClient
) -> None:
    """Workers lock one job each, a study all of its jobs: a cycle would end one of them."""
    body = {"options": ["b"], "grid": GRID, "num_seeds": 20}
    ids = [client.post("/studies", json=body).raise_for_status().json()["id"] for _ in range(2)]
    stop = threading.Event()
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=finish_jobs, args=(settings, stop, failures)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for _ in range(3):
        for study_id in ids:
            for name in ("pause", "resume"):
                client.post(f"/studies/{study_id}/{name}").raise_for_status()
    answers = [client.post(f"/studies/{study_id}/cancel").status_code for study_id in ids]
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(answers) <= {200, 409}, "409 once all jobs are finished"


def finish_jobs(settings: Settings, stop: threading.Event, failures: list[BaseException]) -> None:
    """Claim and finish jobs as a worker does."""
    engine = open_database(settings)
    try:
        while not stop.is_set():
            job = queue.claim(engine, worker_id="w", lease_seconds=100)
            if job is not None:
                lease = Lease(job.id, job.attempt, "w")
                with suppress(LeaseLostError):
                    queue.finish(engine, lease, test_metrics={})
    except BaseException as error:
        failures.append(error)
    engine.dispose()
