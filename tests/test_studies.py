"""Studies: queued whole or not at all, steered together, and judged at planned looks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import BOTH_DATABASES, open_client, problem
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, func, select, update
from sqlmodel import Session, col
from stored_state import read_state
from study_results import (
    FIRST_END,
    QUICK,
    end_seeds,
    judge,
    read_job_ids,
    read_study,
    submit_study,
)

from server.database.engine import write_transaction
from server.jobs import queue, studies
from server.judging.studies import ResultCache
from server.main import create_app
from server.models.tables import Job, JobEvent, JobStatus, Study, StudyJob
from server.races import advance_races
from server.settings import Settings

pytestmark = BOTH_DATABASES

Json = dict[str, Any]
PASSING = {"a": "fffff", "b": "ppppp"}


def post(client: TestClient, *, key: str | None = None, **body: Any) -> Json:
    headers = {} if key is None else {"Idempotency-Key": key}
    request = {"options": ["a", "b"], "config": QUICK, **body}
    answer = client.post("/studies", json=request, headers=headers)
    assert answer.status_code == 201, answer.text
    study: Json = answer.json()
    assert answer.headers["location"] == f"/studies/{study['id']}"
    return study


def read(client: TestClient, study: Json | str, **query: Any) -> Json:
    study_id = study if isinstance(study, str) else study["id"]
    answer: Json = client.get(f"/studies/{study_id}", params=query).raise_for_status().json()
    return answer


def command(client: TestClient, study: Json, name: str, **body: Any) -> Json:
    answer = client.post(f"/studies/{study['id']}/{name}", json=body or None)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def count(engine: Engine, table: type = Job) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def read_statuses(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.execute(select(col(Job.status))).scalars())


# -- queueing


def test_study_is_every_arm_with_every_seed(client: TestClient, engine: Engine) -> None:
    study = post(client, name="first", num_seeds=3, grid={"beta": [0.5, 1]}, metadata={"k": "v"})
    assert (study["num_jobs"], study["num_by_status"]) == (12, {"queued": 12})
    assert [arm["arm"] for arm in study["arms"]] == [
        "a beta=0.5", "a beta=1", "b beta=0.5", "b beta=1",
    ]  # fmt: skip
    assert [arm["config"]["beta"] for arm in study["arms"]] == [0.5, 1, 0.5, 1]
    assert [arm["option"] for arm in study["arms"]] == ["a", "a", "b", "b"]
    assert (study["seeds"], study["planned_looks"], study["next_look"]) == ([0, 1, 2], [3], 3)
    assert (study["status"], study["progress"], study["name"]) == ("queued", 0.0, "first")
    with Session(engine) as session:
        jobs = list(session.scalars(select(Job)))
    assert {job.study_id for job in jobs} == {study["id"]}
    assert {job.labels["k"] for job in jobs} == {"v"}
    listed = client.get("/jobs", params={"metadata[k]": "v", "limit": 100}).json()["data"]
    assert len(listed) == 12
    by_arm = {arm["config_sha256"]: arm["jobs"] for arm in study["arms"]}
    for job in jobs:
        assert by_arm[job.config_sha256][job.config["seed"]] == job.id


def test_seeds_are_claimed_in_turn_so_that_an_early_look_is_balanced(
    client: TestClient, engine: Engine
) -> None:
    post(client, options=["b", "a", "c"], seeds=[7, 3])
    names = []
    while job := queue.claim(engine, worker_id="w", lease_seconds=60):
        names.append(job.name)
    assert names == [f"{arm} seed {seed}" for seed in (7, 3) for arm in "bac"]


def test_study_of_higher_priority_is_claimed_first(client: TestClient, engine: Engine) -> None:
    post(client, num_seeds=1)
    urgent = post(client, num_seeds=1, priority=5)
    job = queue.claim(engine, worker_id="w", lease_seconds=60)
    assert job is not None
    assert job.study_id == urgent["id"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, [42, 42]), ({"data_seed": 7}, [7, 7]), ({"data_seed": None}, [0, 1])],
)
def test_all_seeds_train_on_the_same_data_unless_each_has_its_own(
    client: TestClient, engine: Engine, config: Json, expected: list[int]
) -> None:
    post(client, options=["b"], num_seeds=2, config=QUICK | config)
    with Session(engine) as session:
        configs = [job.config for job in session.scalars(select(Job).order_by(col(Job.created_at)))]
    assert [each["seed"] for each in configs] == [0, 1]
    assert [each["data_seed"] for each in configs] == expected


def test_dry_run_says_what_would_be_queued_and_stores_nothing(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    before = read_state(engine, settings)
    body = {"options": ["a", "b"], "num_seeds": 10, "config": QUICK}
    answer = client.post("/studies?dry_run=true", json=body)
    assert answer.status_code == 200
    plan = answer.json()
    assert (plan["num_jobs"], plan["looks"], plan["estimated_seconds"]) == (20, [5, 10], None)
    assert [arm["arm"] for arm in plan["arms"]] == ["a", "b"]
    race = client.post("/studies?dry_run=true", json=body | {"num_seeds": 5, "until_decided": True})
    assert (race.json()["num_jobs"], race.json()["max_num_jobs"]) == (10, 80)
    assert read_state(engine, settings) == before


def test_dry_run_estimates_by_what_jobs_took(client: TestClient, engine: Engine) -> None:
    study = post(client, options=["b"], num_seeds=1)
    end_seeds(engine, study["id"], {"b": "p"})  # took a minute
    body = {"options": ["b"], "num_seeds": 2, "config": QUICK}
    assert client.post("/studies?dry_run=true", json=body).json()["estimated_seconds"] == 120
    twice = body | {"config": QUICK | {"epochs": 6}}
    assert client.post("/studies?dry_run=true", json=twice).json()["estimated_seconds"] == 240
    again = client.post("/studies?dry_run=true", json=body | {"reuse": True}).json()
    assert (again["num_reused"], again["estimated_seconds"]) == (1, 60)


def test_inline_arm_has_its_own_settings_and_its_whole_name(client: TestClient) -> None:
    name = "<b>\u05d0\u202e & co"
    arm = {"name": name, "base": "b", "config": {"free_bits": 0.1, "epochs": 4}}
    study = post(client, options=["b", arm], num_seeds=1)
    assert [each["arm"] for each in study["arms"]] == ["b", name]
    assert [each["option"] for each in study["arms"]] == ["b", "b"]
    assert study["arms"][1]["config"]["free_bits"] == 0.1
    assert [each["config"]["epochs"] for each in study["arms"]] == [QUICK["epochs"], 4]
    job = client.get(f"/jobs/{study['arms'][1]['jobs'][0]}").json()
    assert (job["name"], job["study_id"]) == (f"{name} seed 0", study["id"])


# -- once


def test_repeated_request_makes_one_study(client: TestClient, engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: post(client, key="k", num_seeds=2), range(8)))
    assert len({study["id"] for study in found}) == 1
    assert (count(engine, Study), count(engine), count(engine, JobEvent)) == (1, 4, 4)
    headers = {"Idempotency-Key": "k"}
    other = client.post("/studies", json={"options": ["a"]}, headers=headers)
    assert problem(other, 422)["errors"][0]["field"] == "Idempotency-Key"
    assert count(engine, Study) == 1


def test_full_queue_takes_no_part_of_a_study(settings: Settings, engine: Engine) -> None:
    with open_client(create_app(settings.model_copy(update={"max_queued_jobs": 9}))) as client:
        post(client, num_seeds=2)
        before = read_state(engine, settings)
        answer = client.post("/studies", json={"options": ["a", "b"], "num_seeds": 3})
        detail = problem(answer, 429)["detail"]
        assert "LOSSLAB_MAX_QUEUED_JOBS" in detail
        assert read_state(engine, settings) == before
        (study,) = client.get("/studies").json()["data"]
        answer = client.post(f"/studies/{study['id']}/seeds", json={"num": 3})
        problem(answer, 429)
        assert read_state(engine, settings) == before


def test_largest_study_needs_a_few_statements(engine: Engine, settings: Settings) -> None:
    grid = {"beta": [number / 10 for number in range(20)]}
    statements = count_statements(
        engine,
        lambda: submit_study(
            engine, settings, options=["b"], grid=grid, num_seeds=100, metadata={"a": "1"}
        ),
    )
    assert count(engine) == count(engine, JobEvent) == count(engine, StudyJob) == 2000
    assert statements < 20
    (study_id,) = [study.id for study in list_studies(engine)]
    for change in (studies.pause_study, studies.resume_study, studies.cancel_study):
        assert count_statements(engine, lambda change=change: run(engine, change, study_id)) < 30
    assert read_statuses(engine) == ["cancelled"] * 2000
    assert count(engine, JobEvent) == 4 * 2000


def count_statements(engine: Engine, execute: Callable[[], object]) -> int:
    """How often the database is asked."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        execute()
    finally:
        event.remove(engine, "before_cursor_execute", note)
    return len(statements)


def list_studies(engine: Engine) -> list[Study]:
    with Session(engine) as session:
        return list(session.scalars(select(Study)))


def run(engine: Engine, change: studies.Command, study_id: str) -> Study:
    with write_transaction(engine) as session:
        return change(session, study_id)


# -- reuse


def test_finished_jobs_of_the_same_run_are_taken(client: TestClient, engine: Engine) -> None:
    first = post(client, num_seeds=3)
    end_seeds(engine, first["id"], {"a": "fno", "b": "ppq"})
    second = post(client, num_seeds=3, reuse=True)
    assert second["num_by_status"] == {"succeeded": 3, "failed": 1, "queued": 2}
    assert [seed["is_reused"] for seed in second["arms"][0]["seeds"]] == [True, True, False]
    assert [seed["is_reused"] for seed in second["arms"][1]["seeds"]] == [True, True, False]
    assert first["arms"][1]["jobs"][:2] == second["arms"][1]["jobs"][:2]
    assert first["arms"][1]["jobs"][2] != second["arms"][1]["jobs"][2]
    assert count(engine) == 8
    assert post(client, num_seeds=3)["num_by_status"] == {"queued": 6}, "only if asked for"


def test_newest_run_is_taken_and_rather_that_on_the_same_data(
    client: TestClient, engine: Engine
) -> None:
    found = {}
    for data_seed in (42, 42, 7):
        study = post(client, options=["b"], num_seeds=1, config=QUICK | {"data_seed": data_seed})
        end_seeds(engine, study["id"], {"b": "p"})
        found[data_seed] = study["arms"][0]["jobs"][0]

    def reuse(**config: int) -> str:
        study = post(client, options=["b"], num_seeds=1, reuse=True, config=QUICK | config)
        job_id: str = study["arms"][0]["jobs"][0]
        return job_id

    assert reuse() == found[42]
    assert reuse(data_seed=7) == found[7]
    assert reuse(data_seed=8) not in found.values()
    client.delete(f"/jobs/{found[42]}").raise_for_status()
    with engine.begin() as connection:
        on_default_data = select(StudyJob.job_id).join(Job, col(Job.id) == col(StudyJob.job_id))
        rows = connection.execute(on_default_data.where(col(Job.status) == "succeeded")).scalars()
        for job_id in set(rows) - {found[7]}:
            connection.execute(update(Job).where(col(Job.id) == job_id).values(status="cancelled"))
    assert reuse() == found[7]


def test_reused_jobs_are_neither_cancelled_nor_deleted_with_the_study(
    client: TestClient, engine: Engine
) -> None:
    first = post(client, num_seeds=1)
    end_seeds(engine, first["id"], {"a": "f", "b": "p"})
    second = post(client, num_seeds=2, reuse=True)
    assert command(client, second, "cancel")["num_by_status"] == {"succeeded": 2, "cancelled": 2}
    deleted = client.delete(f"/studies/{second['id']}").json()
    assert (deleted["num_jobs_deleted"], deleted["num_jobs_kept"]) == (2, 2)
    assert read(client, first)["num_by_status"] == {"succeeded": 2}


def test_job_that_another_study_uses_is_kept(client: TestClient, engine: Engine) -> None:
    first = post(client, num_seeds=2)
    end_seeds(engine, first["id"], {"a": "ff", "b": "pp"})
    second = post(client, num_seeds=1, reuse=True)
    deleted = client.delete(f"/studies/{first['id']}").json()
    assert (deleted["num_jobs_deleted"], deleted["num_jobs_kept"]) == (2, 2)
    assert read(client, second)["num_by_status"] == {"succeeded": 2}
    for arm in second["arms"]:
        assert client.get(f"/jobs/{arm['jobs'][0]}").json()["study_id"] is None


@pytest.mark.parametrize("reuse", [False, True])
def test_job_that_a_study_counts_cannot_train_longer_than_the_others(
    client: TestClient, engine: Engine, reuse: bool
) -> None:
    first = post(client, num_seeds=1)
    end_seeds(engine, first["id"], {"a": "f", "b": "p"})
    job_id = first["arms"][1]["jobs"][0]
    if reuse:
        post(client, num_seeds=1, reuse=True)
        client.delete(f"/studies/{first['id']}", params={"jobs": "keep"}).raise_for_status()
    answer = client.post(f"/jobs/{job_id}/resume", json={"epochs": 30})
    assert "whose jobs train equally long" in problem(answer, 409)["detail"]


# -- further seeds


def test_further_seeds_add_looks_and_say_what_the_error_holds_for(
    client: TestClient, engine: Engine
) -> None:
    study = post(client)
    end_seeds(engine, study["id"], PASSING)
    before = read(client, study)
    assert before["recommendation"]["state"] == "decided"
    extended = command(client, study, "seeds", num=5)
    assert (extended["num_jobs"], extended["status"]) == (20, "running")
    assert extended["planned_looks"] == [5, 10]
    assert extended["next_look"] == 10
    assert extended["looks"] == before["looks"]
    end_seeds(engine, study["id"], {"a": "fffff", "b": "ppppp"}, first=5)
    after = read(client, study)
    assert [look["num_seeds"] for look in after["looks"]] == [5, 10]
    assert (
        "the error of 5% holds for the looks that were planned"
        in (after["recommendation"]["reason"])
    )


def test_lost_seed_does_not_change_a_look_when_seeds_are_added(
    client: TestClient, engine: Engine
) -> None:
    study = post(client)
    end_seeds(engine, study["id"], {"a": "fffff", "b": "pppop"})
    before = read(client, study)
    assert [look["ruled_out"] for look in before["looks"]] == [["a"]]
    extended = command(client, study, "seeds", num=5)
    assert extended["looks"] == before["looks"]
    assert extended["recommendation"]["kept"] == ["b"]
    end_seeds(engine, study["id"], {"a": "ppppp", "b": "fffff"}, first=5)
    assert read(client, study)["looks"][:1] == before["looks"]


def test_seeds_that_are_added_at_the_same_time_are_different_and_looked_at(
    client: TestClient,
) -> None:
    study = post(client, num_seeds=1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: command(client, study, "seeds", num=2), range(4)))
    found = read(client, study)
    assert (found["seeds"], found["num_jobs"]) == (list(range(9)), 18)
    assert found["planned_looks"][-1] == 9


def test_further_seeds_are_limited(client: TestClient, engine: Engine, settings: Settings) -> None:
    study = post(client, options=["b"], num_seeds=99)
    before = read_state(engine, settings)
    answer = problem(client.post(f"/studies/{study['id']}/seeds", json={"num": 2}), 409)
    (error,) = answer["errors"]
    assert (error["field"], "101; 100 are allowed" in error["message"]) == ("num", True)
    for body in ({}, {"num": 0}, {"num": 101}, {"num": "1"}, {"num": True}, {"num": 1, "x": 1}):
        problem(client.post(f"/studies/{study['id']}/seeds", json=body), 422)
    assert read_state(engine, settings) == before


def test_paused_study_gets_no_seeds_before_it_is_resumed(client: TestClient) -> None:
    study = post(client, num_seeds=1)
    command(client, study, "pause")
    answer = client.post(f"/studies/{study['id']}/seeds", json={"num": 1})
    assert "resume it" in problem(answer, 409)["detail"]
    command(client, study, "resume")
    assert command(client, study, "seeds", num=1)["num_jobs"] == 4


def test_cancelled_study_goes_on_with_further_seeds(client: TestClient) -> None:
    study = post(client, num_seeds=1)
    command(client, study, "cancel")
    extended = command(client, study, "seeds", num=1)
    assert (extended["status"], extended["next_look"]) == ("queued", 2)
    assert extended["num_by_status"] == {"cancelled": 2, "queued": 2}


# -- steering


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


# -- looks


def test_look_uses_the_first_judged_seeds_and_waits_for_them(
    engine: Engine, settings: Settings
) -> None:
    study_id = submit_study(engine, settings, num_seeds=10)
    end_seeds(engine, study_id, {"a": "fff", "b": "ppp"})
    end_seeds(engine, study_id, {"a": "ppppp", "b": "fffff"}, first=5)
    assert (judge(engine, study_id).looks, judge(engine, study_id).next_look) == ([], 5)
    end_seeds(engine, study_id, {"a": "oo", "b": "pp"}, first=3)
    first, _ = judge(engine, study_id).looks
    assert (first.num_seeds, first.ruled_out) == (5, []), "two of five against five of five"
    end_seeds(engine, study_id, {"a": "ff"}, first=3)
    first, _ = judge(engine, study_id).looks
    assert (first.num_seeds, first.ruled_out) == (5, ["a"])


def test_look_does_not_change_when_later_seeds_end_first(
    engine: Engine, settings: Settings
) -> None:
    study_id = submit_study(engine, settings, num_seeds=10)
    end_seeds(engine, study_id, PASSING)
    before = judge(engine, study_id)
    assert [look.ruled_out for look in before.looks] == [["a"]]
    end_seeds(engine, study_id, {"a": "qpppp", "b": "qffff"}, first=5)
    after = judge(engine, study_id)
    assert after.looks == before.looks
    assert after.recommendation.reason == before.recommendation.reason
    assert (after.arms[0].num_judged, after.next_look) == (9, 10)


def test_cancelled_study_is_judged_by_what_there_is(client: TestClient, engine: Engine) -> None:
    study = post(client, num_seeds=20)
    end_seeds(engine, study["id"], {"a": "fffffff", "b": "ppppppp"})
    found = command(client, study, "cancel")
    assert [look["num_seeds"] for look in found["looks"]] == [5, 10]
    assert (found["next_look"], found["status"]) == (None, "cancelled")
    assert found["arms"][0]["num_missing"] == 13
    assert found["recommendation"]["reason"].startswith("b escapes collapse, 7 of 7; a is ruled")


def test_thresholds_of_the_request_are_kept_and_those_of_a_query_judge_anew(
    client: TestClient, engine: Engine
) -> None:
    strict = {"min_foreground_recall": 0.7}
    study = post(client, thresholds=strict)
    end_seeds(engine, study["id"], PASSING)
    assert read(client, study)["thresholds"] == strict
    assert [arm["num_passed"] for arm in read(client, study)["arms"]] == [0, 0]
    lenient = read(client, study, min_foreground_recall=0.3)
    assert [arm["num_passed"] for arm in lenient["arms"]] == [0, 5]
    assert lenient["recommendation"]["arm"] == "b"
    assert [arm["num_passed"] for arm in read(client, study)["arms"]] == [0, 0]


def test_thresholds_of_a_query_need_fit_only_those_of_the_study(client: TestClient) -> None:
    study = post(client, thresholds={"min_accuracy": 0.9, "max_accuracy": 1.0})
    read(client, study, min_accuracy=0.95)
    read(client, study, max_accuracy=0.92)
    bad = client.get(f"/studies/{study['id']}", params={"max_accuracy": 0.8})
    (error,) = problem(bad, 422)["errors"]
    assert "min_accuracy must not be above max_accuracy" in error["message"]


def test_answer_has_every_seed_of_every_arm(client: TestClient, engine: Engine) -> None:
    study = post(client, num_seeds=3)
    end_seeds(engine, study["id"], {"a": "fdn", "b": "ppr"})
    first, second = read(client, study)["arms"]
    assert [seed["has_passed"] for seed in first["seeds"]] == [False, None, False]
    assert [seed["status"] for seed in first["seeds"]] == ["succeeded", None, "failed"]
    assert [seed["seed"] for seed in first["seeds"]] == [0, 1, 2]
    assert first["jobs"][1] is None
    assert second["metrics"]["val_foreground_iou"]["values"] == [0.2, 0.2, None]
    assert second["pass_rate_interval"] == pytest.approx([0.3424, 1.0], abs=1e-4)
    assert second["diagnoses"] == {"healthy": 2}


def test_results_are_read_with_few_statements_whatever_the_number_of_arms_and_seeds(
    engine: Engine, settings: Settings
) -> None:
    cache, numbers = ResultCache(), []
    for num_arms, num_seeds in ((1, 2), (10, 8)):
        grid = {"beta": [number / 10 for number in range(num_arms)]}
        study_id = submit_study(engine, settings, options=["b"], grid=grid, num_seeds=num_seeds)
        arms = [arm["name"] for arm in read_study(engine, study_id).arms]
        end_seeds(engine, study_id, dict.fromkeys(arms, "p" * num_seeds))
        for _ in range(2):
            reading = lambda i=study_id: judge(engine, i, cache=cache)  # noqa: E731
            numbers.append(count_statements(engine, reading))
    assert numbers == [numbers[0], numbers[0] - 1] * 2, "the epochs are read once"
    with Session(engine) as session:
        listing = lambda: studies.read_studies(session, after=None, limit=20)  # noqa: E731
        assert count_statements(engine, listing) == 2


def test_list_is_newest_first_in_pages(client: TestClient) -> None:
    ids = [post(client, options=["b"], num_seeds=1)["id"] for _ in range(3)][::-1]
    page = client.get("/studies", params={"limit": 2}).json()
    assert ([entry["id"] for entry in page["data"]], page["has_more"]) == (ids[:2], True)
    rest = client.get("/studies", params={"limit": 2, "after": ids[1]}).json()
    assert ([entry["id"] for entry in rest["data"]], rest["has_more"]) == (ids[2:], False)
    problem(client.get("/studies", params={"after": "nothing"}), 404)
    problem(client.get("/studies", params={"limit": 101}), 422)


@pytest.mark.parametrize("study_id", ["0123456789ab", "nope", "%00", "a'b", "9" * 400])
@pytest.mark.parametrize("name", ["", "/cancel", "/pause", "/resume", "/seeds"])
def test_unknown_study_is_named(client: TestClient, study_id: str, name: str) -> None:
    if name:
        answer = client.post(f"/studies/{study_id}{name}", json={"num": 1} if name else None)
    else:
        answer = client.get(f"/studies/{study_id}")
    assert "there is no study" in problem(answer, 404)["detail"]


def test_many_requests_at_the_same_time_do_not_wait_for_each_others_connections(
    client: TestClient, engine: Engine
) -> None:
    found = [post(client, options=["b"], num_seeds=1) for _ in range(12)]
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda study: command(client, study, "pause"), found * 2))
    assert read_statuses(engine) == ["paused"] * 12


def test_job_that_vanishes_while_a_study_is_judged_is_missing(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=1)
    end_seeds(engine, study["id"], {"a": "f", "b": "p"})
    (job_id,) = read_job_ids(engine, study["id"], 0)
    assert job_id is not None
    queue.remove(engine, job_id)
    found = read(client, study)
    assert (found["arms"][0]["num_missing"], found["num_jobs"]) == (1, 2)
    assert found["recommendation"]["kept"] == ["a", "b"]


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


def test_race_is_looked_at_by_the_server(client: TestClient, engine: Engine) -> None:
    study = post(client, until_decided=True, max_seeds=5)
    end_seeds(engine, study["id"], PASSING)
    advance_races(engine, cache=ResultCache(), max_queued_jobs=100)
    found = read(client, study)
    assert (found["status"], found["recommendation"]["arm"]) == (JobStatus.succeeded, "b")
    assert found["looks"][0]["at"].startswith(f"{FIRST_END:%Y-%m-%d}")
