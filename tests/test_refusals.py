"""The HTTP API's answers to invalid requests."""

import json
import re
from typing import Any

import pytest
from conftest import BOTH_DATABASES, open_client, problem
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.problems import install_problem_handlers
from server.errors import LosslabError
from server.main import create_app
from server.models.tables import Artifact, ArtifactKind
from server.settings import Settings

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "option", "required"),
        ({"option": "d"}, "option", "there is no option 'd'; allowed are a, b, c"),
        ({"option": "b", "seed": -1}, "seed", "greater than or equal to 0, not -1"),
        ({"option": "b", "data_seed": 2**31}, "data_seed", "less than or equal to 2147483647"),
        ({"option": "b", "epohcs": 3}, "epohcs", "unknown field; did you mean epochs?"),
        ({"option": "b", "data": "arc"}, "data", "did you mean dataset?"),
        ({"option": "b", "zzz": 1}, "zzz", "unknown field; see GET /options"),
        ({"option": "b", "epochs": -1}, "epochs", "greater than or equal to 1, not -1"),
        ({"option": "b", "epochs": 1001}, "epochs", "less than or equal to 1000"),
        ({"option": "b", "epochs": None}, "epochs", "integer"),
        ({"option": "b", "latent_dim": 0}, "latent_dim", "greater than or equal to 1"),
        ({"option": "b", "batch_size": 1e9}, "batch_size", "less than or equal to 4096"),
        ({"option": "b", "beta_schedule": "no"}, "beta_schedule", "linear_warmup"),
        ({"option": "b", "dataset": "../../etc/passwd"}, "dataset", "pattern"),
        ({"option": "b", "dataset": "nope"}, "dataset", "atomic, arc"),
        ({"option": "b", "metadata": {"k": "v" * 513}}, "metadata.k", "512"),
        ({"option": "b", "name": ""}, "name", "at least 1 character"),
        ({"option": "b", "name": "two\nlines"}, "name", "pattern"),
        ({"option": "b", "priority": 101}, "priority", "100"),
    ],
)
@pytest.mark.usefixtures("no_traceback")
def test_bad_input_is_answered_with_field_and_what_is_allowed(
    client: TestClient, body: dict[str, Any], field: str, words: str
) -> None:
    answer = problem(client.post("/jobs", json=body), 422)
    assert [error["field"] for error in answer["errors"]] == [field]
    assert words in answer["errors"][0]["message"]
    assert client.get("/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"config": {"betta": 1}}, "config.betta", "unknown field; did you mean beta?"),
        ({"config": {"option": "a"}}, "config.option", "unknown field"),
        ({"config": {"beta": -1}}, "config.beta", "greater than or equal to 0, not -1"),
        ({"config": {"beta": "1"}}, "config.beta", "must be a number, not '1'"),
        ({"config": {"epochs": 2.5}}, "config.epochs", "integer"),
        ({"config": {"augment": 1}}, "config.augment", "must be true or false"),
        ({"config": {"class_weighting": "no"}}, "config.class_weighting", "sqrt_inverse"),
        ({"config": {"dataset": "../x"}}, "config.dataset", "pattern"),
        ({"config": {"seed": 3}}, "config.seed", "belongs to a job or a study, not to an option"),
        ({"config": {"data_seed": 3}}, "config.data_seed", "belongs to a job or a study"),
        ({"config": {"seed": -1}}, "config.seed", "greater than or equal to 0"),
        ({"config": []}, "config", "dictionary"),
        ({"config": None}, "config", "dictionary"),
        ({"base": "d"}, "base", "there is no option 'd'; allowed are a, b, c"),
        ({"base": "b_soft"}, "base", "there is no option 'b_soft'"),
        ({"base": ".."}, "base", "pattern"),
        ({"base": "b\0"}, "base", "pattern"),
        ({"base": None}, "base", "string"),
        ({"bas": "b"}, "bas", "unknown field; did you mean base?"),
        ({"quick_test": True}, "quick_test", "unknown field"),
        ({"summary": "x" * 501}, "summary", "500"),
        ({"summary": "two\nlines"}, "summary", "pattern"),
        ({"summary": "a\0b"}, "summary", "pattern"),
        ({"summary": 1}, "summary", "string"),
    ],
)
@pytest.mark.usefixtures("no_traceback")
def test_bad_option_is_answered_with_field_and_what_is_allowed(
    client: TestClient, changes: dict[str, Any], field: str, words: str
) -> None:
    answer = problem(client.put("/options/b_soft", json={"base": "b"} | changes), 422)
    assert [error["field"] for error in answer["errors"]] == [field]
    assert words in answer["errors"][0]["message"]
    problem(client.get("/options/b_soft"), 404)


def test_field_of_a_new_job_is_not_suggested_for_a_change(client: TestClient) -> None:
    job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
    answer = problem(client.patch(f"/jobs/{job_id}", json={"name": "x"}), 422)
    assert answer["detail"].endswith("unknown field; /docs lists the known ones")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.usefixtures("no_traceback")
def test_learning_rate_must_be_finite(client: TestClient, number: str) -> None:
    response = client.post(
        "/jobs",
        content=f'{{"option": "b", "learning_rate": {number}}}',
        headers={"Content-Type": "application/json"},
    )
    (error,) = problem(response, 422)["errors"]
    assert error["field"] == "learning_rate"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"b"', b"\xff\xfe"])
@pytest.mark.usefixtures("no_traceback")
def test_body_that_is_no_json_object_is_refused(client: TestClient, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/jobs", content=content, headers=headers).status_code in (400, 422)


def test_broken_json_is_told_by_its_place(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/jobs", content=b'{"option": }', headers=headers)
    (error,) = problem(answer, 422)["errors"]
    assert (error["field"], error["message"]) == (
        "body",
        "no JSON: Expecting value (character 11)",
    )


@BOTH_DATABASES
@pytest.mark.parametrize(
    "path",
    [
        *("", "/metrics", "/log", "/verdict"),
        *("/reconstructions", "/reconstructions/1.png", "/checkpoints", "/checkpoints/best"),
    ],
)
@pytest.mark.parametrize("job_id", ["0123456789ab", "nope", "%00", "a'b", "9" * 400])
@pytest.mark.usefixtures("no_traceback")
def test_unknown_job_is_named(client: TestClient, job_id: str, path: str) -> None:
    answer = problem(client.get(f"/jobs/{job_id}{path}"), 404)
    assert "there is no job" in answer["detail"]


def test_unknown_route_and_method_are_problems_too(client: TestClient) -> None:
    problem(client.get("/nope"), 404)
    problem(client.put("/jobs"), 405)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("status=done", "status.0"),
        ("option=x", "option"),
        ("statu=failed", "statu"),
    ],
)
@pytest.mark.usefixtures("no_traceback")
def test_bad_query_is_answered_with_its_parameter(
    client: TestClient, query: str, field: str
) -> None:
    answer = problem(client.get(f"/jobs?{query}"), 422)
    assert [error["field"] for error in answer["errors"]] == [field]


@BOTH_DATABASES
def test_full_queue_is_answered_429(settings: Settings) -> None:
    small = settings.model_copy(update={"max_queued_jobs": 1})
    with open_client(create_app(small)) as client:
        client.post("/jobs", json={"option": "a"})
        problem(client.post("/jobs", json={"option": "a"}), 429)


def test_api_without_a_dashboard_answers_problems_on_every_path() -> None:
    app = FastAPI()
    install_problem_handlers(app)
    with open_client(app) as client:
        assert problem(client.get("/ui/nowhere"), 404)["title"] == "Not Found"


def test_error_that_is_not_meant_for_clients_is_a_fault_with_a_request_id(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    @app.get("/broken")
    def break_down() -> None:
        raise LosslabError("a secret of the server")

    with open_client(app) as client:
        response = client.get("/broken")
    # The HTTP server closes the connection after a fault; who kept it open should know that.
    assert response.headers["connection"] == "close"
    answer = problem(response, 500)
    assert "secret" not in str(answer)
    assert f"request {answer['request_id']} failed" in caplog.messages


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        ({"options": ["a"], "grid": {"\ud800": [1]}}, "\\ud800"),
        ({"options": ["a"], "grid": {"\x9b\u202e": [1]}}, "\\u009b\\u202e"),
    ],
)
@pytest.mark.usefixtures("no_traceback")
def test_refusal_quotes_halves_of_characters_and_controls_in_other_words(
    client: TestClient, body: dict[str, Any], quoted: str
) -> None:
    response = client.post("/studies", content=json.dumps(body), headers=JSON)
    problem(response, 422)
    assert quoted in response.text


@BOTH_DATABASES
@pytest.mark.usefixtures("no_traceback")
@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "POST"])
@pytest.mark.parametrize("name", ["%00", "a%00b", "%ed%a0%80", "%c2%9b%e2%80%ae"])
def test_no_name_in_a_path_is_a_fault_of_the_server(
    client: TestClient, method: str, name: str
) -> None:
    for path in list_named_paths(client):
        response = client.request(method, path.replace("NAME", name), json={})
        assert response.status_code < 500, (path, response.text)
        assert not set("\x9b\u202e") & set(response.text), path


def list_named_paths(client: TestClient) -> list[str]:
    paths = client.get("/openapi.json").json()["paths"]
    return [re.sub(r"\{\w+\}", "NAME", path) for path in paths if "{" in path]


#: A refusal says the first few things and how many there are.
MAX_REFUSAL_BYTES = 20_000


def test_refusal_of_many_fields_names_some_and_counts_the_rest(client: TestClient) -> None:
    unknown = {f"f{number:x}": 0 for number in range(5000)}
    answer = client.post("/jobs", json={"option": "b"} | unknown)
    found = problem(answer, 422)
    assert [error["field"] for error in found["errors"]] == [f"f{n:x}" for n in range(10)]
    assert found["detail"].endswith("; and 4,990 more fields are invalid")
    assert len(answer.content) < MAX_REFUSAL_BYTES


@pytest.mark.parametrize(
    "request_",
    [
        ("POST", "/jobs", {"f" * 60_000: 0}),
        ("POST", "/jobs", {"option": "b", "name": "n" * 60_000}),
        ("POST", "/jobs", {"option": "b", "dataset": "d" * 60_000}),
        ("POST", "/jobs", {"option": "o" * 60_000}),
        ("POST", "/jobs", {"option": "b", "metadata": {f"{n}": 1 for n in range(5000)}}),
        ("POST", "/studies", {"options": ["x" * 60 for _ in range(900)], "num_seeds": 2}),
        ("POST", "/studies", {f"f{n:x}": 0 for n in range(5000)}),
        ("GET", "/comparisons?" + "&".join(f"x{n}=1" for n in range(1000)), None),
        ("GET", "/jobs?after=" + "x" * 10_000, None),
        ("GET", "/jobs/" + "x" * 10_000, None),
    ],
    ids=lambda request_: f"{request_[0]} {request_[1][:20]} {str(request_[2])[:20]}",
)
def test_no_refusal_is_long(client: TestClient, request_: tuple[str, str, Any]) -> None:
    method, path, body = request_
    answer = client.request(method, path, json=body)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < MAX_REFUSAL_BYTES


def test_missing_file_of_an_epoch_names_some_of_many(client: TestClient, engine: Engine) -> None:
    job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
    with Session(engine) as session:
        session.add_all(
            Artifact(job_id=job_id, kind=kind, epoch=epoch, file_name="f", size_bytes=1, sha256="")
            for kind in ArtifactKind
            for epoch in range(1, 1001)
        )
        session.commit()
    for path in ("checkpoints/2000", "reconstructions/2000.png"):
        detail = problem(client.get(f"/jobs/{job_id}/{path}"), 404)["detail"]
        assert detail.endswith("19, 20 and 980 more")


def test_unknown_data_set_beside_many_names_some(client: TestClient, settings: Settings) -> None:
    settings.datasets_dir.mkdir(parents=True, exist_ok=True)
    for number in range(300):
        (settings.datasets_dir / f"{number:060d}.npz").touch()
    answers = [
        client.get("/datasets/nope"),
        client.get("/datasets/nope/preview.png"),
        client.post("/jobs", json={"option": "b", "dataset": "nope"}),
    ]
    for answer in answers:
        assert " more. " in answer.json()["detail"]
        assert len(answer.content) < MAX_REFUSAL_BYTES
