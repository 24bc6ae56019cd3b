"""The pages of every filter together have all matching jobs, newest first."""

from collections.abc import Iterator
from typing import Any

import many_jobs
import pytest
from conftest import BOTH_DATABASES, MakeSettings, open_client, queue_job
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlmodel import Session, func, select

from server.database.engine import write_transaction
from server.main import create_app
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption
from server.models.tables import Job, JobLabel, JobStatus

pytestmark = BOTH_DATABASES

NUM_JOBS = 600
Json = dict[str, Any]


@pytest.fixture(scope="module")
def laboratory(
    tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings
) -> Iterator[TestClient]:
    app = create_app(make_settings(tmp_path_factory.mktemp("laboratory")))
    with open_client(app) as client:
        many_jobs.fill(app.state.engine, num_jobs=NUM_JOBS, num_epochs=1)
        yield client


def read_all(client: TestClient, query: Json, *, limit: int) -> list[Json]:
    """All pages of a list."""
    jobs: list[Json] = []
    while True:
        page = client.get("/jobs", params=query | {"limit": limit}).raise_for_status().json()
        jobs += page["data"]
        if not page["has_more"]:
            return jobs
        assert len(page["data"]) == limit
        query = query | {"after": jobs[-1]["id"]}


def is_wanted(job: Json, query: Json) -> bool:
    labels = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata")}
    statuses = query.get("status", job["status"])
    return (
        job["status"] in ([statuses] if isinstance(statuses, str) else statuses)
        and query.get("option", job["option"]) == job["option"]
        and query.get("name", job["name"]) == job["name"]
        and labels.items() <= job["metadata"].items()
    )


@pytest.mark.parametrize(
    "query",
    [
        {"status": "succeeded"},
        {"status": ["queued", "paused", "failed"]},
        {"status": ["failed", "failed"]},
        {"status": [str(status) for status in JobStatus]},
        {"option": "a"},
        {"option": "b", "status": ["failed", "cancelled"]},
        {"name": many_jobs.COMMON_NAME},
        {"name": many_jobs.COMMON_NAME, "option": "b", "status": "succeeded"},
        {"metadata[study]": many_jobs.COMMON_STUDY},
        {"metadata[study]": many_jobs.COMMON_STUDY, "metadata[owner]": "ada"},
        {"metadata[study]": many_jobs.COMMON_STUDY, "status": ["failed", "succeeded"]},
        {"metadata[owner]": "ada", "name": many_jobs.COMMON_NAME, "option": "a"},
        {"metadata[study]": many_jobs.RARE_STUDY},
        {"metadata[study]": "nobody's"},
        {"metadata[owner]": many_jobs.COMMON_STUDY},
    ],
    ids=str,
)
def test_pages_are_what_the_filter_keeps(laboratory: TestClient, query: Json) -> None:
    jobs = read_all(laboratory, {}, limit=100)
    assert len({job["id"] for job in jobs}) == NUM_JOBS
    assert jobs == sorted(jobs, key=lambda job: (job["created_at"], job["id"]), reverse=True)
    wanted = [job["id"] for job in jobs if is_wanted(job, query)]
    for limit in (7, 100):
        assert [job["id"] for job in read_all(laboratory, query, limit=limit)] == wanted


def test_jobs_of_one_instant_are_each_listed_once(client: TestClient, engine: Engine) -> None:
    labels = {"study": "x"}
    jobs = [queue_job(engine, option=BuiltInOption.a, config=TrainingConfig(), labels=labels)
            for _ in range(5)]  # fmt: skip
    with write_transaction(engine) as session:
        for job in jobs:
            session.get_one(Job, job.id).created_at = jobs[0].created_at
            session.get_one(JobLabel, (job.id, "study")).created_at = jobs[0].created_at
    expected = sorted((job.id for job in jobs), reverse=True)
    queries: list[Json] = [
        {},
        {"metadata[study]": "x"},
        {"status": ["queued", "running"], "option": "a"},
    ]
    for query in queries:
        assert [job["id"] for job in read_all(client, query, limit=2)] == expected


@pytest.mark.parametrize("key", ["a", "a b", "a]b", "[]", "é", "a\nb", "k" * 64])
def test_job_is_found_by_any_label(client: TestClient, key: str) -> None:
    body = {"option": "a", "metadata": {key: "value & more"}}
    job = client.post("/jobs", json=body).raise_for_status().json()
    client.post("/jobs", json={"option": "a", "metadata": {key: "other"}}).raise_for_status()
    found = read_all(client, {f"metadata[{key}]": "value & more"}, limit=2)
    assert [each["id"] for each in found] == [job["id"]]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("metadata=x", "metadata"),
        ("metadata[study=x", "metadata[study"),
        ("metadata[]=x", "metadata."),
        ("metadata[a]=x&metadata[a]=y", "metadata[a]"),
        (f"metadata[{'k' * 65}]=x", f"metadata.{'k' * 65}"),
        (f"metadata[a]={'v' * 513}", "metadata.a"),
        ("metadata[a]=%00", "metadata.a"),
        ("name=%00", "name"),
    ],
)
def test_filter_that_no_job_can_match_is_refused(
    client: TestClient, query: str, field: str
) -> None:
    answer = client.get(f"/jobs?{query}")
    assert answer.status_code == 422
    assert [error["field"].removesuffix(".[key]") for error in answer.json()["errors"]] == [field]


@pytest.mark.parametrize(
    "body", [{"name": "a\0"}, {"metadata": {"k": "\0"}}, {"metadata": {"\0": ""}}]
)
def test_text_that_postgresql_cannot_keep_is_refused(client: TestClient, body: Json) -> None:
    assert client.post("/jobs", json={"option": "a"} | body).status_code == 422


def test_labels_go_with_their_job(client: TestClient, engine: Engine) -> None:
    body = {"option": "a", "metadata": {"study": "x", "owner": "ada"}}
    job_id = client.post("/jobs", json=body).raise_for_status().json()["id"]
    client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    client.delete(f"/jobs/{job_id}").raise_for_status()
    with Session(engine) as session:
        assert session.exec(select(func.count()).select_from(JobLabel)).one() == 0


def test_api_describes_the_filter_by_labels(client: TestClient) -> None:
    parameters = client.get("/openapi.json").json()["paths"]["/jobs"]["get"]["parameters"]
    (labels,) = [each for each in parameters if each["name"] == "metadata"]
    assert (labels["in"], labels["style"], labels["explode"]) == ("query", "deepObject", True)
    assert (labels["schema"]["type"], labels["schema"]["maxProperties"]) == ("object", 16)
    assert {each["name"] for each in parameters} == {
        "metadata", "status", "option", "name", "limit", "after",
    }  # fmt: skip
