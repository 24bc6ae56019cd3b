"""Login to the dashboard, and forms of other sites."""

from collections.abc import Iterator

import pytest
from conftest import SubmitJob, open_client, read
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine

from server.main import create_app
from server.models.tables import JobStatus
from server.settings import Settings

TOKEN = "a-long-and-secret-token"
OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))
    with open_client(app) as client:
        client.follow_redirects = False
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    ],
)
def test_forms_of_other_sites_change_nothing(
    client: TestClient, engine: Engine, submit_job: SubmitJob, headers: dict[str, str]
) -> None:
    job = submit_job()
    assert client.post(f"/ui/jobs/{job.id}/cancel", headers=headers).status_code == 403
    assert client.post("/ui/jobs", data={"option": "a"}, headers=headers).status_code == 403
    assert read(engine, job).status == JobStatus.queued
    assert len(client.get("/jobs").json()["data"]) == 1


def test_origin_proves_a_form_where_the_browser_says_nothing_else(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    client.post(f"/ui/jobs/{job.id}/cancel", headers={"Origin": "http://localhost"})
    assert read(engine, job).status == JobStatus.cancelled


def test_pages_ask_for_the_token_and_keep_it_in_a_cookie(guarded: TestClient) -> None:
    answer = guarded.get("/ui/compare?options=a,b")
    assert answer.status_code == 303
    login = answer.headers["location"]
    assert login == "/ui/login?next=%2Fui%2Fcompare%3Foptions%3Da%2Cb"
    form = guarded.get(login)
    assert form.status_code == 200
    assert 'name="next" value="/ui/compare?options=a,b"' in form.text
    wrong = guarded.post("/ui/login", data={"token": "wrong"}, headers=OWN)
    assert wrong.status_code == 403
    assert "set-cookie" not in wrong.headers
    sent = {"token": TOKEN, "next": "/ui/compare?options=a,b"}
    right = guarded.post("/ui/login", data=sent, headers=OWN)
    assert (right.status_code, right.headers["location"]) == (303, "/ui/compare?options=a,b")
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert guarded.get("/").status_code == 200
    assert guarded.get("/jobs").status_code == 200
    guarded.post("/ui/logout", headers=OWN)
    assert guarded.get("/").status_code == 303


def test_cookie_changes_nothing_for_other_sites(guarded: TestClient) -> None:
    guarded.post("/ui/login", data={"token": TOKEN}, headers=OWN)
    assert guarded.post("/jobs", json={"option": "a"}).status_code == 401
    assert guarded.post("/ui/jobs", data={"option": "a"}).status_code == 303
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://elsewhere.example"}):
        assert guarded.post("/jobs", json={"option": "a"}, headers=headers).status_code == 403
        assert guarded.post("/ui/jobs", data={"option": "a"}, headers=headers).status_code == 403
    assert guarded.get("/jobs").json()["data"] == []
    assert guarded.post("/jobs", json={"option": "a"}, headers=OWN).status_code == 201


@pytest.mark.parametrize("cookie", ["", "=", "nonsense", "YQ", "YQ==", TOKEN, "ÿ", "/" * 5000])
def test_cookies_without_the_token_open_nothing(guarded: TestClient, cookie: str) -> None:
    header = f"losslab_token={cookie}".encode("latin-1")
    answer = guarded.get("/jobs", headers={b"Cookie": header})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        *("http://elsewhere.example/", "//elsewhere.example", "/\\elsewhere.example"),
        *("javascript:1", "//[", "//\u2100/x", "/\t/elsewhere.example"),
    ],
)
def test_login_leads_to_no_other_site(guarded: TestClient, target: str) -> None:
    answer = guarded.post("/ui/login", data={"token": TOKEN, "next": target}, headers=OWN)
    assert answer.headers["location"] == "/"
