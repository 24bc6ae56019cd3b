"""Studies are paused, resumed, cancelled and deleted with all of their jobs."""

import csv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from conftest import BOTH_DATABASES, problem
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select, update
from sqlmodel import Session, col
from stored_state import read_state
from study_results import (
    FIRST_END,
    PASSING,
    QUICK,
    command,
    count,
    count_statements,
    end_seeds,
    post,
    read,
    read_job_ids,
    read_statuses,
    run,
    submit_study,
)

from server.jobs import queue, studies
from server.models.columns import utc_now
from server.models.studies import Study, StudyJob
from server.models.tables import Job, JobEvent
from server.settings import Settings

pytestmark = BOTH_DATABASES


def test_pause_resume_and_cancel_act_on_all_jobs_and_may_be_repeated(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=2)
    queue.claim(engine, worker_id="w", lease_seconds=1000)
    for _ in range(2):
        paused = command(client, study, "pause")
        assert paused["num_by_status"] == {"running": 1, "paused": 3}
    for _ in range(2):
        resumed = command(client, study, "resume")
        assert resumed["num_by_status"] == {"running": 1, "queued": 3}
    for _ in range(2):
        cancelled = command(client, study, "cancel")
        assert cancelled["num_by_status"] == {"running": 1, "cancelled": 3}
    assert cancelled["status"] == "running"
    assert "being cancelled" in problem(client.post(f"/studies/{study['id']}/pause"), 409)["detail"]
    assert "wait until" in problem(client.post(f"/studies/{study['id']}/resume"), 409)["detail"]


def test_study_that_ended_cannot_be_steered(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    study = post(client, num_seeds=1)
    end_seeds(engine, study["id"], {"a": "n", "b": "p"})
    before = read_state(engine, settings)
    for name in ("cancel", "pause", "resume"):
        answer = problem(client.post(f"/studies/{study['id']}/{name}"), 409)
        assert "has ended" in answer["detail"]
    assert read_state(engine, settings) == before


def test_resumed_study_trains_lost_seeds_again_and_no_judged_ones(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=6)
    end_seeds(engine, study["id"], {"a": "fnoutc", "b": "pppppp"})
    assert read(client, study)["arms"][0]["num_missing"] == 4
    assert command(client, study, "resume")["num_by_status"] == {
        "queued": 4,
        "succeeded": 7,
        "failed": 1,
    }


@pytest.mark.parametrize(
    ("endings", "status"),
    [
        ({"a": "qq", "b": "qq"}, "queued"),
        ({"a": "qc", "b": "qq"}, "queued"),
        ({"a": "qp", "b": "qq"}, "running"),
        ({"a": "rq", "b": "qq"}, "running"),
        ({"a": "pp", "b": "pi"}, "succeeded"),
        ({"a": "ni", "b": "cc"}, "failed"),
        ({"a": "cc", "b": "cc"}, "cancelled"),
        ({"a": "dd", "b": "dd"}, "cancelled"),
        ({"a": "dd", "b": "pd"}, "succeeded"),
    ],
)
def test_status_and_progress_sum_up_the_jobs(
    client: TestClient, engine: Engine, endings: dict[str, str], status: str
) -> None:
    study = post(client, num_seeds=2)
    end_seeds(engine, study["id"], endings)
    letters = "".join(endings.values())
    progress = sum({"q": 0.0, "r": 0.5}.get(letter, 1.0) for letter in letters) / 4
    (entry,) = client.get("/studies").json()["data"]
    for found in (read(client, study), entry):
        assert (found["status"], found["progress"], found["num_jobs"]) == (status, progress, 4)
    assert entry["num_by_status"] == read(client, study)["num_by_status"]


def test_seconds_left_are_those_of_the_jobs_that_wait(client: TestClient, engine: Engine) -> None:
    study = post(client, num_seeds=2)
    assert read(client, study)["seconds_left"] is None
    end_seeds(engine, study["id"], {"a": "pr", "b": "pq"})  # a minute each
    assert read(client, study)["seconds_left"] == 90
    end_seeds(engine, study["id"], {"a": "pp", "b": "pp"})
    assert read(client, study)["seconds_left"] is None


def test_job_that_was_paused_for_a_night_makes_no_other_seem_long(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=5)
    end_seeds(engine, study["id"], {"a": "pppqq", "b": "ppppr"})
    before = read(client, study)["seconds_left"]
    with engine.begin() as connection:
        started_at = FIRST_END - timedelta(hours=10)
        job_ids = [arm["jobs"][0] for arm in read(client, study)["arms"]]
        changed = update(Job).where(col(Job.id).in_(job_ids)).values(started_at=started_at)
        connection.execute(changed)
    assert before <= read(client, study)["seconds_left"] < 2 * before


def test_clock_that_was_set_back_makes_no_duration_and_no_estimate_negative(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=2)
    end_seeds(engine, study["id"], {"a": "pr", "b": "pq"})
    with engine.begin() as connection:
        for job in connection.execute(select(col(Job.id), col(Job.started_at))).all():
            started_at = job.started_at and job.started_at + timedelta(hours=2)
            claimed_at = utc_now() + timedelta(hours=2)
            changed = update(Job).where(col(Job.id) == job.id)
            values = {"started_at": started_at, "claimed_at": claimed_at, "progress": 0.5}
            connection.execute(changed.values(**values))
    assert read(client, study)["seconds_left"] is None
    for job in client.get("/jobs").json()["data"]:
        assert job["seconds_left"] is None
    rows = client.get(f"/studies/{study['id']}/jobs.csv").text.splitlines()
    seconds = [row["seconds"] for row in csv.DictReader(rows)]
    assert set(seconds) == {""}
    answer = client.post("/studies?dry_run=true", json={"options": ["a"], "num_seeds": 2})
    assert answer.json()["estimated_seconds"] is None


# -- deleting


def test_deleting_needs_an_end_and_says_what_it_deletes(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    study = post(client, num_seeds=2)
    assert "4 jobs have not ended" in problem(
        client.delete(f"/studies/{study['id']}"), 409)["detail"]  # fmt: skip
    command(client, study, "cancel")
    for arm in study["arms"]:
        for job_id in arm["jobs"]:
            (settings.runs_dir / job_id / "checkpoints").mkdir(parents=True)
    answer = client.delete(f"/studies/{study['id']}")
    assert answer.json() == {"id": study["id"], "num_jobs_deleted": 4, "num_jobs_kept": 0}
    assert [count(engine, table) for table in (Study, StudyJob, Job, JobEvent)] == [0] * 4
    assert list(settings.runs_dir.iterdir()) == []
    problem(client.get(f"/studies/{study['id']}"), 404)


def test_study_may_be_deleted_without_its_jobs(client: TestClient, engine: Engine) -> None:
    study = post(client, num_seeds=1)
    command(client, study, "cancel")
    answer = client.delete(f"/studies/{study['id']}", params={"jobs": "keep"}).json()
    assert answer == {"id": study["id"], "num_jobs_deleted": 0, "num_jobs_kept": 2}
    jobs = client.get("/jobs").json()["data"]
    assert [job["study_id"] for job in jobs] == [None, None]
    assert count(engine, Study) == count(engine, StudyJob) == 0


def test_large_study_is_deleted_with_few_statements(
    client: TestClient, engine: Engine, settings: Settings, app: FastAPI
) -> None:
    study_id = submit_study(engine, settings, num_seeds=100)
    run(engine, studies.cancel_study, study_id)
    server: Engine = app.state.engine
    num = count_statements(server, lambda: client.delete(f"/studies/{study_id}").raise_for_status())
    assert count(engine) == 0
    assert num < 60


def test_race_that_goes_on_is_not_deleted(client: TestClient, engine: Engine) -> None:
    study = post(client, until_decided=True)
    command(client, study, "pause")
    end_seeds(engine, study["id"], PASSING)
    detail = problem(client.delete(f"/studies/{study['id']}"), 409)["detail"]
    assert "its race goes on; cancel it" in detail
    command(client, study, "cancel")
    client.delete(f"/studies/{study['id']}").raise_for_status()


def test_option_and_data_set_stay_while_a_study_needs_them(
    client: TestClient, engine: Engine, write_npz: Callable[..., str]
) -> None:
    client.put("/options/mine", json={"base": "b", "config": {"beta": 2}}).raise_for_status()
    name = write_npz(images=np.zeros((20, 8, 8), dtype=np.uint8))
    study = post(client, options=["mine"], until_decided=True, config=QUICK | {"dataset": name})
    assert study["id"] in problem(client.delete("/options/mine"), 409)["detail"]
    command(client, study, "pause")
    end_seeds(engine, study["id"], {"mine": "fffff"})
    assert study["id"] in problem(client.delete(f"/datasets/{name}"), 409)["detail"]
    command(client, study, "cancel")
    client.delete(f"/datasets/{name}").raise_for_status()
    answer = client.post(f"/studies/{study['id']}/seeds", json={"num": 1})
    assert name in problem(answer, 409)["detail"]
    write_npz(images=np.ones((20, 8, 8), dtype=np.uint8))
    answer = client.post(f"/studies/{study['id']}/seeds", json={"num": 1})
    assert "another data set" in problem(answer, 409)["detail"]
    client.delete(f"/studies/{study['id']}").raise_for_status()
    client.delete("/options/mine").raise_for_status()


def test_many_requests_at_the_same_time_do_not_wait_for_each_others_connections(
    client: TestClient, engine: Engine
) -> None:
    found = [post(client, options=["b"], num_seeds=1) for _ in range(12)]
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda study: command(client, study, "pause"), found * 2))
    assert read_statuses(engine) == ["paused"] * 12


def test_batch_changes_a_job_as_a_single_request_does(engine: Engine, settings: Settings) -> None:
    """Each job of one study alone, those of its twin together."""
    single, many = (submit_study(engine, settings, options=["b"], num_seeds=7) for _ in range(2))
    for study_id in (single, many):
        end_seeds(engine, study_id, {"b": "picqqqq"})
        ids = read_job_ids(engine, study_id, 0)
        queue.pause(engine, ids[3] or "")
        for place, seconds in ((4, 1000.0), (5, 0.0), (6, 1000.0)):
            queue.claim(engine, worker_id="w", lease_seconds=seconds, job_id=ids[place])
    for change, alone in (
        (studies.pause_study, queue.pause),
        (studies.resume_study, queue.resume),
        (studies.cancel_study, queue.cancel),
    ):
        run(engine, change, many)
        for job_id in read_job_ids(engine, single, 0):
            try:
                alone(engine, job_id or "")
            except queue.JobStateError:
                continue
        assert describe_jobs(engine, single) == describe_jobs(engine, many)


def describe_jobs(engine: Engine, study_id: str) -> list[Any]:
    """Rows and events of a study's jobs, without their ids; of times only whether there is one."""
    described = []
    with Session(engine) as session:
        for job_id in read_job_ids(engine, study_id, 0):
            row = session.get_one(Job, job_id).model_dump(exclude={"id", "study_id"})
            told = select(JobEvent.kind, JobEvent.message).where(col(JobEvent.job_id) == job_id)
            values = {k: v if k[-3:] != "_at" else v is not None for k, v in row.items()}
            described.append((values, session.execute(told.order_by(col(JobEvent.id))).all()))
    return described
