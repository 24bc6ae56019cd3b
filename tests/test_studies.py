"""Studies: queued whole or not at all, from new jobs or finished ones, and extended."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import BOTH_DATABASES, open_client, problem
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine, select
from sqlmodel import Session, col
from stored_state import read_state
from study_results import (
    PASSING,
    QUICK,
    Json,
    command,
    count,
    count_statements,
    end_seeds,
    list_studies,
    post,
    read,
    read_statuses,
    run,
    submit_study,
)

from server.api.study_requests import StudyRequest
from server.database.engine import write_transaction
from server.jobs import queue, studies
from server.jobs.options import UnknownOptionError
from server.jobs.seeds import submit_study as submit
from server.main import create_app
from server.models.studies import Study, StudyJob
from server.models.tables import Job, JobEvent
from server.settings import Settings

pytestmark = BOTH_DATABASES


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


def test_repeated_request_adds_seeds_once(client: TestClient, engine: Engine) -> None:
    study, other = post(client, num_seeds=1), post(client, num_seeds=1)

    def add(study_id: str, **body: int) -> Response:
        headers = {"Idempotency-Key": "more"}
        return client.post(f"/studies/{study_id}/seeds", json=body, headers=headers)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: add(study["id"], num=3), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text for answer in answers} == {answers[0].text}
    assert len(client.get(f"/studies/{study['id']}").json()["seeds"]) == 4
    for changed in (add(study["id"], num=2), add(other["id"], num=3)):
        assert problem(changed, 422)["errors"][0]["field"] == "Idempotency-Key"
    assert len(client.get(f"/studies/{other['id']}").json()["seeds"]) == 1


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


def test_study_of_an_option_that_was_deleted_meanwhile_is_not_stored(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    client.put("/options/mine", json={"base": "b"}).raise_for_status()
    request = StudyRequest.model_validate({"options": ["a", "mine"]})
    with Session(engine) as session:
        study = request.make_study(session, datasets_dir=settings.datasets_dir)
    client.delete("/options/mine").raise_for_status()
    with pytest.raises(UnknownOptionError, match="mine"), write_transaction(engine) as session:
        submit(session, study, seeds=[0])
    assert count(engine, Study) == count(engine) == 0


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


def test_newest_run_on_the_studys_own_data_is_taken_and_no_other(
    client: TestClient, engine: Engine
) -> None:
    found = {}
    for data_seed in (42, 42, 7):
        study = post(client, options=["b"], num_seeds=1, config=QUICK | {"data_seed": data_seed})
        end_seeds(engine, study["id"], {"b": "p"})
        found[data_seed] = study["arms"][0]["jobs"][0]

    def reuse(**config: int | None) -> str:
        study = post(client, options=["b"], num_seeds=1, reuse=True, config=QUICK | config)
        job_id: str = study["arms"][0]["jobs"][0]
        return job_id

    assert reuse() == found[42]
    assert reuse(data_seed=7) == found[7]
    assert reuse(data_seed=8) not in found.values()
    assert reuse(data_seed=None) not in found.values(), "each seed has data of its own"


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


# -- finding


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
