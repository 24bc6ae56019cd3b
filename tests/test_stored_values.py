"""What another version may have stored in a row: no list and no page fails because of it."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest
from conftest import BOTH_DATABASES, SubmitJob, drain, open_client, problem, read
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text
from sqlmodel import SQLModel, select
from stored_studies import store_study

from server.database.engine import write_transaction
from server.jobs import options
from server.main import create_app
from server.models.columns import EnumText, FiniteJSON
from server.models.tables import Artifact, ArtifactKind, Job, JobEvent, Worker, WorkerState
from server.settings import Settings

#: JSON of every kind, in the place of what this version would have stored.
VALUES: Final[list[Any]] = [
    None, 17, 1e300, "x", [], {}, [1], ["x"], [None], [[]], [{"x": 1}], {"a": 1}, {"a": None},
    {"num_train": "x"}, {"new_threshold": 1}, {"min_accuracy": 7}, {"dataset": None, "epochs": 0},
    {"epochs": "ten", "seed": "x", "num_samples": "a", "latent_dim": []}, {"epochs": -1},
    {"epochs": 10**30, "batch_size": 0, "latent_dim": 0, "seed": 10**30},
    [{"name": "a", "option": "zz", "config": {"beta": "x", "zz": 1}, "config_sha256": "0"}],
]  # fmt: skip
#: What SQLite also takes for JSON.
NO_JSON: Final = ["", "not json", "[1", "NaN", "[" * 5000]
WORDS: Final = ["newer", "", "<b>"]
#: Of each column, so that the test takes seconds.
NUM_VALUES: Final = 3
NUM_ADDRESSES: Final = 2


class Stored(NamedTuple):
    client: TestClient
    engine: Engine
    addresses: list[str]


@pytest.fixture
def stored(settings: Settings, engine: Engine) -> Iterator[Stored]:
    """One row of each table at least, and every address that a browser or a program may read."""
    study_id = store_study(engine, {"a": ["healthy"] * 2, "b": ["mode_collapse"] * 2})
    options.add_option(engine, "own", base="b", config={"beta": 2.0}, summary="")
    with write_transaction(engine) as session:
        jobs = session.scalars(select(Job.id).order_by(Job.id)).all()
        session.add(Worker(id="w1", host="h", pid=1, device="cpu", state=WorkerState.idle))
        for job_id in jobs:
            session.add(JobEvent(job_id=job_id, kind="warning", message="hot", data={"a": 1}))
            session.add(
                Artifact(job_id=job_id, kind=ArtifactKind.reconstruction, epoch=1, file_name="x",
                         size_bytes=1, sha256="0" * 64, samples=[{"loss": 0.1}])
            )  # fmt: skip
    app = create_app(settings)
    names = {"job_id": jobs[0], "study_id": study_id, "name": "own", "epoch": "1", "action": "x"}
    templates = [path for path, item in app.openapi()["paths"].items() if "get" in item]
    pages = [
        "/", "/ui/jobs/new", "/ui/jobs/{job_id}", "/ui/studies", "/ui/studies/new",
        "/ui/studies/{study_id}", f"/ui/compare?job_id={jobs[0]}&job_id={jobs[-1]}",
        "/comparisons?options=a,b", f"/comparisons?job_id={jobs[0]}&job_id={jobs[-1]}",
        f"/comparisons/report.html?job_id={jobs[0]}&job_id={jobs[-1]}",
        "/jobs/{job_id}/verdict?criteria=evidence", "/studies/{study_id}?criteria=evidence",
    ]  # fmt: skip
    addresses = sorted({path.format(**names) for path in [*templates, *pages]})
    with open_client(app) as client:
        yield Stored(client, engine, addresses)


def replace(engine: Engine, table: str, column: str, value: str, *, is_json: bool) -> None:
    given = "CAST(:value AS JSON)" if is_json and engine.dialect.name != "sqlite" else ":value"
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text("PRAGMA ignore_check_constraints = ON"))
        connection.execute(text(f'UPDATE {table} SET "{column}" = {given}'), {"value": value})


def list_changes(engine: Engine) -> Iterator[tuple[str, str, list[str]]]:
    """Each table and column with the texts to put there."""
    is_sqlite = engine.dialect.name == "sqlite"
    for table in SQLModel.metadata.sorted_tables:
        for column in table.columns:
            is_checked = bool(column.constraints)
            if isinstance(column.type, FiniteJSON):
                yield table.name, column.name, [*map(json.dumps, VALUES), *NO_JSON * is_sqlite]
            elif isinstance(column.type, EnumText) and (is_sqlite or not is_checked):
                yield table.name, column.name, WORDS
    yield "study", "criteria", WORDS


@BOTH_DATABASES
def test_no_address_fails_because_of_a_stored_value(stored: Stored) -> None:
    """Some addresses for each value, other ones each time; the seed makes a failure repeatable."""
    chance = random.Random(0)
    client, engine, failed = stored.client, stored.engine, list[str]()
    for table, column, values in list_changes(engine):
        is_json = column != "criteria" and values is not WORDS
        with engine.connect() as connection:
            before = connection.execute(
                text(f'SELECT CAST("{column}" AS VARCHAR) FROM {table}')
            ).scalar()
        for value in chance.sample(values, min(len(values), NUM_VALUES)):
            replace(engine, table, column, value, is_json=is_json)
            for address in chance.sample(stored.addresses, NUM_ADDRESSES):
                answer = client.get(address)
                if answer.status_code >= 500 and address != "/readyz":
                    failed.append(f"{table}.{column} = {value[:60]}: {address}: {answer.text[:80]}")
        replace(engine, table, column, before, is_json=is_json)
    assert not failed, "\n".join(failed)


#: Parts of a summary, and texts that look like lists of numbers only beside others.
PARTS: Final = {
    ("job", "dataset_summary"): [
        {"new": 1}, {"num_available": {}}, {"num_available": {"train": 3}}, {"overlap": {}},
        {"overlap": {"val": {"exact": 1, "by_orbit": 1}, "test": {"exact": 0, "by_orbit": 0}}},
    ],
    ("job", "provenance"): [{"torch_version": "9"}, {"is_changed": True}],
    ("epoch_metrics", "val_kl_per_dimension"): ["", "[1],[2]"],
}  # fmt: skip
#: Addresses that read most of a job.
READERS: Final = re.compile("/ui/jobs/.{12}$|/ui/studies/.{12}$|compar|report|jobs.csv|verdict")


@pytest.mark.parametrize("place", PARTS, ids=".".join)
def test_readers_of_a_job_take_what_is_there_of_a_value(
    stored: Stored, place: tuple[str, str]
) -> None:
    for part in PARTS[place]:
        value = part if isinstance(part, str) else json.dumps(part)
        replace(stored.engine, *place, value, is_json=True)
        for address in filter(READERS.search, stored.addresses):
            answer = stored.client.get(address)
            assert answer.status_code < 500, (address, value)


@BOTH_DATABASES
def test_no_command_fails_because_of_a_stored_value(stored: Stored) -> None:
    """Some values for each column, other ones each time; the seed makes a failure repeatable."""
    chance = random.Random(1)
    client, engine, failed = stored.client, stored.engine, list[str]()
    (study,) = client.get("/studies").json()["data"]
    job = client.get("/jobs").json()["data"][0]["id"]
    commands: list[tuple[str, str, Any]] = [
        ("POST", f"/studies/{study['id']}/seeds", {"num": 1}),
        *(
            ("POST", f"/studies/{study['id']}/{name}", None)
            for name in ("pause", "resume", "cancel")
        ),
        *(("POST", f"/jobs/{job}/{name}", {"epochs": 9}) for name in ("resume", "pause", "cancel")),
        ("PATCH", f"/jobs/{job}", {"name": "x", "pinned": True}),
        ("POST", "/studies", {"options": ["a", "b"], "num_seeds": 2, "reuse": True}),
        ("POST", "/jobs", {"option": "own"}),
        ("POST", "/studies", {"options": ["a", "own"], "num_seeds": 1}),
        ("PUT", "/options/own", {"base": "b", "config": {"beta": 2.0}}),
        ("PUT", "/options/next", {"base": "own", "config": {"beta": 3.0}}),
    ]
    for table, column, values in list_changes(engine):
        if table not in ("job", "study", "study_job", "own_option", "metrics"):
            continue
        for value in chance.sample(values, min(len(values), NUM_VALUES)):
            is_json = column != "criteria" and values is not WORDS
            with engine.connect() as connection:
                before = connection.execute(
                    text(f'SELECT CAST("{column}" AS VARCHAR) FROM {table}')
                ).scalar()
            replace(engine, table, column, value, is_json=is_json)
            for method, path, body in commands:
                answer = client.request(method, path, json=body)
                if answer.status_code >= 500:
                    failed.append(f"{table}.{column} = {value[:60]}: {path}: {answer.text[:80]}")
            replace(engine, table, column, before, is_json=is_json)
    assert not failed, "\n".join(failed)


def test_option_that_cannot_be_read_trains_no_job(stored: Stored) -> None:
    replace(stored.engine, "own_option", "preset", '{"beta": "x", "newer": 1}', is_json=True)
    for path, body in (
        ("/jobs", {"option": "own"}),
        ("/studies", {"options": ["own"], "num_seeds": 1}),
    ):
        refused = problem(stored.client.post(path, json=body), 409)
        assert "stored the settings of this option" in refused["detail"]
        assert "newer" in refused["detail"]
    assert stored.client.get("/options/own").status_code == 200


@pytest.mark.parametrize("column", ["seeds", "looks", "arms"])
def test_study_that_cannot_be_read_gets_no_seeds(stored: Stored, column: str) -> None:
    (study,) = stored.client.get("/studies").json()["data"]
    replace(stored.engine, "study", column, '{"after": 5}', is_json=True)
    refused = problem(stored.client.post(f"/studies/{study['id']}/seeds", json={"num": 1}), 409)
    assert "another version of Losslab stored" in refused["detail"]


def test_words_of_a_later_version_are_shown_in_lists(stored: Stored) -> None:
    """A status, a state of a worker and a set of criteria that this version does not know."""
    client, engine = stored.client, stored.engine
    replace(engine, "job", "status", "archived", is_json=False)
    replace(engine, "worker", "state", "hibernating", is_json=False)
    replace(engine, "study", "criteria", "newer", is_json=False)
    assert {job["status"] for job in client.get("/jobs").json()["data"]} == {"archived"}
    (study,) = client.get("/studies").json()["data"]
    assert study["criteria_set"] == "newer"
    (worker,) = client.get("/workers").json()["data"]
    assert worker["state"] == "hibernating"
    for address in ("/", "/ui/studies", f"/ui/studies/{study['id']}", "/metrics"):
        assert client.get(address).status_code == 200, address


def test_thresholds_that_are_unknown_are_left_out(stored: Stored) -> None:
    (study,) = stored.client.get("/studies").json()["data"]
    thresholds = json.dumps({"new_threshold": 1, "min_foreground_recall": 0.99})
    replace(stored.engine, "study", "thresholds", thresholds, is_json=True)
    shown = stored.client.get(f"/studies/{study['id']}").raise_for_status().json()
    assert [arm["num_passed"] for arm in shown["arms"]] == [0, 0]


def test_study_without_readable_arms_is_listed_and_says_why_it_is_not_judged(
    stored: Stored,
) -> None:
    replace(stored.engine, "study", "arms", '[{"x": 1}]', is_json=True)
    (study,) = stored.client.get("/studies").json()["data"]
    refused = problem(stored.client.get(f"/studies/{study['id']}"), 409)
    assert "another version of Losslab stored the arms" in refused["detail"]
    assert stored.client.get("/ui/studies").status_code == 200


@pytest.mark.parametrize("config", ["[]", "null", '"x"', "17", "not json"])
def test_job_without_readable_settings_is_not_trained(
    settings: Settings, engine: Engine, submit_job: SubmitJob, config: str
) -> None:
    """With the defaults it would be another job; a second attempt would change nothing."""
    job = submit_job()
    replace(engine, "job", "config", config, is_json=True)
    drain(settings, engine)
    ended = read(engine, job)
    assert (ended.attempt, ended.status, ended.failure_kind) == (1, "failed", "user")
    assert ended.error_code == "unknown_config"
    assert "unreadable" in (ended.error_message or "")
