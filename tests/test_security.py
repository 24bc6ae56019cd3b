"""Who is let in, and where the service listens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import open_client
from fastapi.testclient import TestClient
from pydantic import SecretStr

from server.launcher import ServerThread, StartError
from server.main import create_app
from server.settings import Settings

TOKEN = "a-long-and-secret-token"
OPEN_PATHS = {"/healthz", "/readyz"}


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))
    with open_client(app) as client:
        yield client


def list_requests() -> list[tuple[str, str]]:
    paths = create_app(Settings()).openapi()["paths"]
    pages = [("GET", path) for path in ("/docs", "/openapi.json", "/nowhere")]
    return pages + [(method.upper(), path) for path in paths for method in paths[path]]


def test_all_routes_are_walked() -> None:
    assert {("POST", "/jobs"), ("DELETE", "/jobs/{job_id}")} <= set(list_requests())


@pytest.mark.parametrize(("method", "path"), list_requests())
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN} ", TOKEN]
)
def test_every_route_but_health_asks_for_the_token(
    guarded: TestClient, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = guarded.request(method, path, headers=headers)
    if path in OPEN_PATHS:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.text


def test_token_opens_the_service(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.post("/jobs", json={"option": "b"}, headers=headers).status_code == 201
    assert len(guarded.get("/jobs", headers=headers).json()["data"]) == 1


@pytest.mark.parametrize(
    ("host", "published_host", "token", "is_guarded"),
    [
        ("127.0.0.1", "", "", True),
        ("::1", "", "", True),
        ("localhost", "", "", True),
        ("0.0.0.0", "", "", False),
        ("0.0.0.0", "", TOKEN, True),
        ("0.0.0.0", "127.0.0.1", "", True),
        ("0.0.0.0", "0.0.0.0", "", False),
        ("0.0.0.0", "192.168.1.5", TOKEN, True),
        ("127.0.0.1", "0.0.0.0", "", False),
        ("example.org", "", "", False),
    ],
)
def test_service_that_strangers_can_reach_needs_a_token(
    host: str, published_host: str, token: str, is_guarded: bool
) -> None:
    settings = Settings(host=host, published_host=published_host, api_token=SecretStr(token))
    assert settings.is_guarded is is_guarded


def test_open_address_without_a_token_is_not_listened_on(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, host="0.0.0.0", port=0)
    with pytest.raises(StartError, match="set LOSSLAB_API_TOKEN"):
        ServerThread(settings, log_level="info")


def test_secrets_do_not_show() -> None:
    settings = Settings(api_token=SecretStr(TOKEN), database_password=SecretStr(TOKEN))
    assert TOKEN not in repr(settings)


def test_password_goes_into_a_url_that_has_none() -> None:
    password = SecretStr("p@ss/word")
    settings = Settings(database_url="postgresql://u@h/d", database_password=password)
    assert settings.resolved_database_url == "postgresql+psycopg://u:p%40ss%2Fword@h/d"
    settings = Settings(database_url="postgresql://u:own@h/d", database_password=password)
    assert settings.resolved_database_url == "postgresql+psycopg://u:own@h/d"


def test_readiness_names_what_is_missing(client: TestClient, settings: Settings) -> None:
    answer = client.get("/readyz")
    assert answer.status_code == 200
    expected = {"status": "ready", "database": True, "disk": True, "num_workers": 0}
    assert answer.json() == expected
    settings.data_dir.rename(settings.data_dir.with_name("gone"))
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["disk"] is False
