"""Tokens, host names, cross-site requests, and the address of the service."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SubmitJob, open_client
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError
from sqlalchemy import Engine
from starlette.datastructures import Headers
from stored_state import read_state

from server.api import security
from server.cli.listener import StartError, open_listener
from server.cli.processes import ServerThread
from server.cli.reporting import describe_error
from server.dashboard import rendering
from server.dashboard.pages import comparison, job, jobs, login
from server.main import create_app
from server.settings import Settings
from server.tokens import ApiToken, TokenScope, hash_token

TOKEN, READ_TOKEN = "a-long-and-secret-token", "one-that-may-only-look"
OPEN_PATHS = {"/healthz"}
PAGES = [
    route
    for module in (jobs, job, comparison, login, rendering)
    for route in module.router.routes
    if isinstance(route, APIRoute)
]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """A service with a full and a read-only token."""
    reader = ApiToken.of(READ_TOKEN, name="reader", scope=TokenScope.read)
    update = {"api_token": SecretStr(TOKEN), "api_tokens": (reader,)}
    with open_client(create_app(settings.model_copy(update=update))) as client:
        client.follow_redirects = False
        yield client


def list_paths() -> list[str]:
    return [*create_app(Settings()).openapi()["paths"], "/openapi.json", "/nowhere"]


def list_requests() -> list[tuple[str, str]]:
    paths = create_app(Settings()).openapi()["paths"]
    pages = [("GET", path) for path in ("/openapi.json", "/nowhere")]
    return pages + [(method.upper(), path) for path in paths for method in paths[path]]


def list_page_requests() -> list[tuple[str, str]]:
    """The dashboard's routes, except the login and static files."""
    return [
        (method, route.path)
        for route in PAGES
        for method in sorted(route.methods)
        if not route.path.startswith(("/ui/login", "/ui/logout", "/static"))
    ]


def fill_in(path: str, *, job_id: str) -> str:
    """The path as it would be sent."""
    values = {"job_id": job_id, "epoch": "best", "name": "mine", "action": "cancel"}
    values["study_id"] = "0" * 12  # there is none; a token is asked for before that is found out
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], path)


def test_all_routes_are_walked() -> None:
    assert {("POST", "/jobs"), ("DELETE", "/jobs/{job_id}")} <= set(list_requests())
    assert {("PUT", "/datasets/{name}"), ("GET", "/metrics")} <= set(list_requests())
    assert {("POST", "/ui/jobs/{job_id}/{action}"), ("GET", "/")} <= set(list_page_requests())


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


def test_no_method_of_any_route_changes_anything_without_a_token(
    guarded: TestClient, engine: Engine, settings: Settings, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    before = read_state(engine, settings)
    for path in list_paths():
        for method in METHODS:
            answer = guarded.request(method, fill_in(path, job_id=job_id), content=b"{}")
            if path not in OPEN_PATHS:
                assert answer.status_code == 401, (method, path)
                assert job_id not in answer.text.replace(answer.request.url.path, "")
    assert read_state(engine, settings) == before


@pytest.mark.parametrize(("method", "path"), list_page_requests())
def test_pages_lead_to_the_login_without_a_token(
    guarded: TestClient,
    engine: Engine,
    settings: Settings,
    submit_job: SubmitJob,
    method: str,
    path: str,
) -> None:
    url = fill_in(path, job_id=submit_job().id)
    before = read_state(engine, settings)
    for cookie in ("", "losslab_token=d3Jvbmc="):
        headers = {"Cookie": cookie, "Sec-Fetch-Site": "same-origin"}
        answer = guarded.request(method, url, headers=headers)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/ui/login?next=")
        assert answer.content == b""
    assert read_state(engine, settings) == before


def test_token_that_may_only_read_changes_nothing(
    guarded: TestClient, engine: Engine, settings: Settings, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    headers = {"Authorization": f"Bearer {READ_TOKEN}"}
    before = read_state(engine, settings)
    for method, path in [*list_requests(), *list_page_requests()]:
        url = fill_in(path, job_id=job_id)
        answer = guarded.request(method, url, headers=headers, json={"option": "a"})
        expected = {403} if method not in ("GET", "HEAD") else {200, 404, 422}
        assert answer.status_code in expected, (method, url, answer.text)
    assert read_state(engine, settings) == before


def test_cookie_of_a_reader_changes_nothing(
    guarded: TestClient, engine: Engine, settings: Settings, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    own = {"Sec-Fetch-Site": "same-origin"}
    assert guarded.post("/ui/login", data={"token": READ_TOKEN}, headers=own).status_code == 303
    before = read_state(engine, settings)
    assert guarded.get(f"/ui/jobs/{job_id}").status_code == 200
    answer = guarded.post(f"/ui/jobs/{job_id}/cancel", headers=own)
    assert answer.status_code == 403
    assert "may only read" in answer.text
    assert read_state(engine, settings) == before


def test_token_opens_the_service(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.post("/jobs", json={"option": "b"}, headers=headers).status_code == 201
    assert len(guarded.get("/jobs", headers=headers).json()["data"]) == 1


@pytest.mark.parametrize(
    "query", [f"token={TOKEN}", f"access_token={TOKEN}", f"api_token={TOKEN}", f"key={TOKEN}"]
)
def test_token_in_an_address_opens_nothing(guarded: TestClient, query: str) -> None:
    assert guarded.get(f"/jobs?{query}").status_code == 401


HOSTS = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
    *("169.254.169.254", "0.0.0.0", "[::ffff:1.2.3.4]", "127.0.0.1@evil.example", "", " "),
    *("localhost\\.evil.example", "localhost/.evil.example", "[", "evil.example:localhost"),
    *("evil.example@localhost", "localhost#.evil.example", "localhost?", "localhost,evil.example"),
]


@pytest.mark.parametrize("host", HOSTS)
def test_foreign_host_is_refused_on_every_route(
    client: TestClient, engine: Engine, settings: Settings, submit_job: SubmitJob, host: str
) -> None:
    job_id = submit_job().id
    before = read_state(engine, settings)
    for method, path in [*list_requests(), *list_page_requests(), ("GET", "/static/x/y.js")]:
        url = fill_in(path, job_id=job_id)
        # Forwarding headers do not bypass the check.
        headers = {"Host": host, "X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"}
        answer = client.request(method, url, headers=headers, json={"option": "a"})
        # An invalid host is refused as invalid.
        assert answer.status_code in (400, 421) or path == "/healthz", (method, path)
    assert read_state(engine, settings) == before


def test_health_answers_to_any_name_since_probes_use_any(settings: Settings) -> None:
    own = settings.model_copy(update={"allowed_hosts": ("lab.example",)})
    with open_client(create_app(own)) as client:
        for host in ("127.0.0.1:8000", "10.0.0.7", "losslab-server-1"):
            assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["[", "http://[", "a b", "localhost:99999999", "ſ"])
def test_host_that_is_none_is_refused_though_any_name_is_allowed(
    guarded: TestClient, host: str
) -> None:
    headers = {
        b"Host": host.encode(),
        b"Origin": b"http://" + host.encode(),
        b"Authorization": f"Bearer {TOKEN}".encode(),
    }
    answer = guarded.post("/jobs", headers=headers, json={"option": "a"})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:1", "LOCALHOST"]
)
def test_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/jobs", headers={"Host": host}).status_code == 200


def test_configured_hosts_are_the_only_ones(settings: Settings) -> None:
    own = settings.model_copy(update={"allowed_hosts": ("lab.example",)})
    with open_client(create_app(own)) as client:
        assert client.get("/jobs", headers={"Host": "lab.example:8000"}).status_code == 200
        assert client.get("/jobs", headers={"Host": "other.example"}).status_code == 421
        # Commands on the machine itself; no other site can have this name.
        assert client.get("/jobs", headers={"Host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing_by_any_method(
    client: TestClient,
    engine: Engine,
    settings: Settings,
    submit_job: SubmitJob,
    headers: dict[str, str],
) -> None:
    job_id = submit_job().id
    before = read_state(engine, settings)
    for path in [*list_paths(), *(route.path for route in PAGES if "static" not in route.path)]:
        for method in ("POST", "PUT", "PATCH", "DELETE", "BREW"):
            url = fill_in(path, job_id=job_id)
            answer = client.request(method, url, headers=headers, json={"option": "a"})
            assert answer.status_code == 403, (method, path)
            assert "access-control-allow-origin" not in answer.headers
    assert read_state(engine, settings) == before


def test_no_other_site_may_read(client: TestClient) -> None:
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"}
    for method in ("GET", "OPTIONS"):
        answer = client.request(method, "/jobs", headers=preflight)
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


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


def test_password_goes_into_a_url_that_has_none() -> None:
    password = SecretStr("p@ss/word")
    settings = Settings(database_url="postgresql://u@h/d", database_password=password)
    assert settings.resolved_database_url == "postgresql+psycopg://u:p%40ss%2Fword@h/d"
    settings = Settings(database_url="postgresql://u:own@h/d", database_password=password)
    assert settings.resolved_database_url == "postgresql+psycopg://u:own@h/d"


def test_secrets_do_not_show() -> None:
    settings = Settings(api_token=SecretStr(TOKEN), database_password=SecretStr(TOKEN))
    assert TOKEN not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("API_TOKENS", f"anna:full:{TOKEN}", "LOSSLAB_API_TOKENS: an API token reads NAME"),
        ("DATABASE_URL", f"mysql://u:{TOKEN}@h/d", "LOSSLAB_DATABASE_URL: must read postgresql://"),
        ("DATABASE_URL", f"postgresql://u:{TOKEN}@h:port/d", "LOSSLAB_DATABASE_URL: cannot be"),
        ("LEASE_SECONDS", "10", "lease_seconds must be at least three times heartbeat_seconds"),
    ],
)
def test_no_message_about_a_setting_has_a_secret_in_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv("LOSSLAB_API_TOKEN", TOKEN)
    monkeypatch.setenv(f"LOSSLAB_{name}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert TOKEN not in str(caught.value)
    message = describe_error(caught.value)
    assert message.startswith(words)
    assert TOKEN not in message


def test_secrets_are_in_no_answer_and_no_log(
    guarded: TestClient, submit_job: SubmitJob, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    job_id, body = submit_job().id, {"option": "x", "name": "kept-to-ourselves"}
    wrong = "nearly-the-secret-token"
    texts: list[Any] = []
    for token in (TOKEN, wrong):
        for method, path in [*list_requests(), *list_page_requests()]:
            headers = {"Authorization": f"Bearer {token}", "Cookie": f"losslab_token={token}"}
            url = fill_in(path, job_id=job_id)
            answer = guarded.request(method, url, headers=headers, json=body)
            texts.append(answer.text + str(answer.headers))
    logged = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    # Of bodies, a refusal may repeat the field that it refuses, and a log nothing.
    assert body["name"] not in logged
    for secret in (TOKEN, READ_TOKEN, wrong):
        assert secret not in "".join(texts)
        assert secret not in logged


def test_description_tells_of_the_token_and_no_secret(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = guarded.get("/openapi.json", headers=headers)
    assert answer.json()["security"] == [{"token": []}]
    assert answer.json()["paths"]["/healthz"]["get"]["security"] == []
    assert TOKEN not in answer.text
    assert ApiToken.of(TOKEN, name="default").sha256 not in answer.text


# -- secrets that are none

WEAK = ["", "x", "guess"]


@pytest.mark.parametrize("secret", WEAK)
def test_short_secret_opens_nothing_whatever_hash_is_configured(
    settings: Settings, secret: str
) -> None:
    token = ApiToken.of(secret, name="weak")
    with open_client(create_app(settings.model_copy(update={"api_tokens": (token,)}))) as client:
        for scheme in ("Bearer", "bearer", "Basic", ""):
            headers = {"Authorization": f"{scheme} {secret}"}
            assert client.get("/jobs", headers=headers).status_code == 401
            assert client.post("/jobs", headers=headers, json={"option": "b"}).status_code == 401
        cookies = {"Cookie": f"losslab_token={login.encode_token(secret)}"}
        assert client.get("/jobs", headers=cookies).status_code == 401
        form = {"token": secret}
        own_page = {"Sec-Fetch-Site": "same-origin"}
        assert client.post("/ui/login", data=form, headers=own_page).status_code == 403


@pytest.mark.parametrize("secret", ["", "\n", "secret", "secret\n", "changeme"])
def test_hash_of_nothing_or_of_a_known_secret_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("LOSSLAB_API_TOKENS", f"anna:full:{hash_token(secret)}")
    with pytest.raises(ValidationError) as refused:
        Settings()
    line = describe_error(refused.value)
    assert line.startswith("LOSSLAB_API_TOKENS: the API token 'anna' has the hash of an empty or")


@pytest.mark.parametrize("secret", WEAK[1:])
def test_short_token_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("LOSSLAB_API_TOKEN", secret)
    with pytest.raises(ValidationError, match="must have at least 6 characters") as refused:
        Settings()
    assert secret not in describe_error(refused.value).replace("characters", "") or secret == "x"


#: Settings of services that others can reach.
REACHED: list[dict[str, Any]] = [
    {"host": "0.0.0.0"},
    {"host": "::"},
    {"host": "192.0.2.1"},
    {"trusted_proxies": ("127.0.0.1/32",)},
]


@pytest.mark.parametrize("reached", REACHED)
def test_token_that_can_be_guessed_is_refused_where_others_reach_the_service(
    settings: Settings, reached: dict[str, Any]
) -> None:
    short = settings.model_copy(update=reached | {"api_token": SecretStr("fifteen-letters")})
    with pytest.raises(StartError, match="LOSSLAB_API_TOKEN has fewer than 16 characters"):
        ServerThread(short, log_level="warning")


def test_short_token_beside_a_public_name_is_told_at_the_start(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The name alone says nothing of who can reach it."""
    changes = {"api_token": SecretStr("s3cret"), "allowed_hosts": ("127.0.0.1:80", "lab.example")}
    open_listener(settings.model_copy(update=changes | {"port": 0})).close()
    (warning,) = caplog.messages
    assert "if a proxy serves others as lab.example (LOSSLAB_ALLOWED_HOSTS)" in warning
    caplog.clear()
    long = {"api_token": SecretStr("sixteen-letters-")}
    open_listener(settings.model_copy(update=changes | long | {"port": 0})).close()
    assert caplog.messages == []


@pytest.mark.parametrize("reached", REACHED)
def test_secret_that_can_be_guessed_opens_nothing_where_others_reach_the_service(
    settings: Settings, reached: dict[str, Any]
) -> None:
    secrets = {"anna": "123456", "bert": "letmein1", "carl": "sixteen-letters-"}
    tokens = tuple(ApiToken.of(secret, name=name) for name, secret in secrets.items())
    own = settings.model_copy(update={"api_tokens": tokens})
    reached_by_others = own.model_copy(update=reached)
    for each, statuses in ((own, [200, 200, 200]), (reached_by_others, [401, 401, 200])):
        with open_client(create_app(each)) as client:
            found = [
                client.get("/jobs", headers={"Authorization": f"Bearer {secret}"}).status_code
                for secret in secrets.values()
            ]
        assert found == statuses


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["ada", "ada"], "another API token is called 'ada' already"),
        (["ada", "default"], "LOSSLAB_API_TOKEN is called 'default' already"),
    ],
)
def test_two_tokens_of_one_name_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, names: list[str], reason: str
) -> None:
    entries = [f"{name}:read:{hash_token(f'secret {place}')}" for place, name in enumerate(names)]
    monkeypatch.setenv("LOSSLAB_API_TOKENS", ",".join(entries))
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert describe_error(refused.value).startswith(f"LOSSLAB_API_TOKENS: {reason}")


def test_secret_under_two_names_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [f"{name}:read:{hash_token('one secret of both')}" for name in ("ada", "bob")]
    monkeypatch.setenv("LOSSLAB_API_TOKENS", ",".join(entries))
    with pytest.raises(ValidationError, match="'bob' has the hash of another one"):
        Settings()


# -- cookies


def make_cookie(form: str) -> str:
    return form.replace("TOKEN", login.encode_token(TOKEN))


@pytest.mark.parametrize(
    "form",
    [
        "losslab_token=TOKEN",
        'losslab_token="TOKEN"',
        "theme=dark; losslab_token=TOKEN",
        'losslab_token=TOKEN; x="a b"; y=a=b=c',
        "  losslab_token=TOKEN  ",
    ],
)
def test_cookie_of_the_login_is_read_beside_others(guarded: TestClient, form: str) -> None:
    assert guarded.get("/jobs", headers={"Cookie": make_cookie(form)}).status_code == 200


@pytest.mark.parametrize(
    "form",
    ["Losslab_token=TOKEN", "x=losslab_token=TOKEN", "losslab_token=!TOKEN", "losslab_token"],
)
def test_cookie_of_another_name_or_form_is_not(guarded: TestClient, form: str) -> None:
    assert guarded.get("/jobs", headers={"Cookie": make_cookie(form)}).status_code == 401


def test_cookie_with_many_escapes_is_read_in_linear_time() -> None:
    """Twice as long takes about twice as long; with a quadratic parser, four times."""

    def measure(num_escapes: int) -> float:
        cookie = 'losslab_token="' + '\\"' * num_escapes + '"'
        headers = Headers({"Cookie": cookie})
        started = time.process_time()
        for _ in range(20):
            assert security.read_token(headers, method="GET") == ""
        return time.process_time() - started

    measure(1000)
    short, long = min(measure(20_000) for _ in range(5)), min(measure(160_000) for _ in range(5))
    assert long < 30 * max(short, 1e-4)  # eight times the length, and a lot of patience


# -- who may not ask is told so first


def test_who_may_not_upload_is_told_so_whatever_is_sent(guarded: TestClient) -> None:
    body = b"x" * 200_000
    wrong = {"Authorization": "Bearer a-wrong-guess-of-a-token"}
    reader = {"Authorization": f"Bearer {READ_TOKEN}"}
    foreign = {"Authorization": f"Bearer {TOKEN}", "Sec-Fetch-Site": "cross-site"}
    for headers, status in (({}, 401), (wrong, 401), (reader, 403), (foreign, 403)):
        for method, path in (("PUT", "/datasets/x"), ("POST", "/jobs"), ("POST", "/studies")):
            answer = guarded.request(method, path, headers=headers, content=body)
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/problem+json"


def test_refusals_are_counted_as_what_they_are(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    guarded.put("/datasets/x", content=b"x" * 200_000)
    guarded.post("/jobs", headers=headers, content=b" " * 200_000)
    guarded.post("/jobs", headers=headers, content=iter([b" " * 100_000]))
    counted = guarded.get("/metrics", headers=headers).text
    sample = r'losslab_request_seconds_count\{method="(\w+)".*status="(\d+)"\} (\S+)'
    counts: Counter[tuple[str, str]] = Counter()
    for method, status, number in re.findall(sample, counted):
        counts[method, status] += int(float(number))
    assert counts == {("PUT", "401"): 1, ("POST", "413"): 2}
