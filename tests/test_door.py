"""What reaches the service from outside: origins, HEAD, bodies, and the path of a reverse proxy."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, SubmitJob, copy_settings, open_client, problem
from fastapi.testclient import TestClient
from httpx2 import Response
from hypothesis import given
from hypothesis import strategies as st
from npz_files import GRIDS, make_npz
from pydantic import SecretStr
from starlette.datastructures import Headers
from test_security import PAGES, fill_in, list_requests

from server.api.addresses import FIRST_PARTS
from server.api.origins import Sender, find_sender
from server.dashboard.rendering import _static_files
from server.main import create_app
from server.settings import Settings

ROOT = Path(__file__).parent.parent
TOKEN = "a-long-and-secret-token"
PREFIX = "/losslab"
Finished = tuple[TestClient, dict[str, str]]


# -- origins


def judge(**headers: str) -> Sender:
    return find_sender(Headers({name.replace("_", "-"): value for name, value in headers.items()}))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("lab.example.org", "https://lab.example.org"),
        ("lab.example.org", "http://lab.example.org"),
        ("lab.example.org:443", "https://lab.example.org"),
        ("lab.example.org:80", "http://lab.example.org"),
        ("lab.example.org", "http://lab.example.org:80"),
        ("lab.example.org:8443", "https://lab.example.org:8443"),
        ("Lab.Example.org:8000", "http://lab.example.org:8000"),
        ("localhost:8000", "HTTP://LOCALHOST:8000"),
        ("lab.example.org.", "https://lab.example.org"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[2001:DB8::1]", "http://[2001:db8::1]:80"),
    ],
)
def test_same_origin_is_the_same_however_it_is_written(host: str, origin: str) -> None:
    assert judge(Host=host, Origin=origin) is Sender.own_page


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("lab.example.org", "https://evil.example"),
        ("lab.example.org", "null"),
        ("lab.example.org", ""),
        ("lab.example.org", "lab.example.org"),
        ("lab.example.org", "https://lab.example.org:8443"),
        ("lab.example.org:443", "http://lab.example.org"),
        ("lab.example.org:80", "https://lab.example.org"),
        ("lab.example.org", "ftp://lab.example.org"),
        ("lab.example.org", "https://lab.example.org.evil.example"),
        ("lab.example.org", "https://evil.example@lab.example.org"),
        ("lab.example.org", "https://lab.example.org/x"),
        ("lab.example.org", "https://lab.example.org:99999"),
        ("", "https://"),
        ("", "http://:80"),
        ("[", "http://["),
    ],
)
def test_other_origin_is_foreign(host: str, origin: str) -> None:
    assert judge(Host=host, Origin=origin) is Sender.foreign_page


@pytest.mark.parametrize("origin", [None, "https://lab.example.org", "http://evil.example", "null"])
def test_browsers_own_word_comes_first(origin: str | None) -> None:
    """A proxy may set `Host` to anything; the origin then says nothing."""
    given_origin = {} if origin is None else {"Origin": origin}
    proxied = {"Host": "127.0.0.1:8000", **given_origin}
    assert judge(**proxied, Sec_Fetch_Site="same-origin") is Sender.own_page
    for site in ("cross-site", "same-site", "nonsense"):
        own = {"Host": "lab.example.org", "Origin": "https://lab.example.org"}
        assert judge(**own, Sec_Fetch_Site=site) is Sender.foreign_page


def test_program_says_nothing_of_pages() -> None:
    assert judge(Host="localhost") is Sender.program
    assert judge(Host="localhost", Sec_Fetch_Site="none") is Sender.program


@given(st.text(), st.text(), st.sampled_from([80, 443, 8000]), st.booleans())
def test_only_the_same_place_is_an_own_page(host: str, other: str, port: int, tls: bool) -> None:
    """Whatever the texts are, no error, and no other host passes."""
    scheme = "https" if tls else "http"
    headers = {"host": host, "origin": f"{scheme}://{other}:{port}"}
    sender = find_sender(Headers(raw=[(k.encode(), v.encode()) for k, v in headers.items()]))
    if sender is Sender.own_page:
        as_sent = [text.encode().decode("latin-1").lower().rstrip(".") for text in (host, other)]
        assert as_sent[0].removesuffix(f":{port}").rstrip(".") == as_sent[1]


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))
    with open_client(app) as client:
        client.follow_redirects = False
        yield client


#: How pages behind proxies reach the service: `Host`, and what the browser sends.
PROXIES = {
    "nginx as it comes": ("127.0.0.1:8000", "https://lab.example.org", "same-origin"),
    "an upstream's name": ("losslab", "https://lab.example.org", "same-origin"),
    "a port that was dropped": ("lab.example.org", "https://lab.example.org:8443", "same-origin"),
    "a default port": ("lab.example.org:443", "https://lab.example.org", None),
    "capitals": ("Lab.Example.org", "https://lab.example.org", None),
}


@pytest.mark.parametrize("proxy", PROXIES)
def test_all_checks_let_an_own_page_in(guarded: TestClient, proxy: str) -> None:
    """The check of every change, the login's and the cookie's are one."""
    host, origin, site = PROXIES[proxy]
    headers = {"Host": host, "Origin": origin} | ({"Sec-Fetch-Site": site} if site else {})
    answer = guarded.post("/ui/login", data={"token": TOKEN}, headers=headers)
    assert answer.status_code == 303, answer.text
    # The proxy need not say that the browser's connection is encrypted.
    assert ("Secure" in answer.headers["set-cookie"]) == origin.startswith("https:")
    cookie = answer.headers["set-cookie"].partition(";")[0]
    headers["Cookie"] = cookie
    assert guarded.post("/jobs", json={"option": "a"}, headers=headers).status_code == 201
    assert guarded.post("/ui/jobs", data={"option": "a"}, headers=headers).status_code == 303
    assert guarded.post("/ui/logout", headers=headers).status_code == 303


@pytest.mark.parametrize("path", ["/ui/login", "/jobs", "/ui/jobs"])
def test_page_behind_a_proxy_that_hides_the_host_is_told_so(guarded: TestClient, path: str) -> None:
    headers = {"Host": "127.0.0.1:8000", "Origin": "http://lab.example.org"}
    answer = guarded.post(path, data={"token": TOKEN}, headers=headers)
    assert answer.status_code == 403
    assert "proxy_set_header Host $http_host" in answer.text
    assert "lab.example.org" in answer.text
    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    answer = guarded.post(path, data={"token": TOKEN}, headers=foreign)
    assert answer.status_code == 403
    assert "proxy" not in answer.text


# -- HEAD


def list_gets() -> list[str]:
    """Every path that answers GET, pages and static files included."""
    pages = [route.path for route in PAGES if "GET" in route.methods and "{name" not in route.path]
    static = _static_files.url("dashboard.css")
    return [*(path for method, path in list_requests() if method == "GET"), *pages, static]


@pytest.fixture(scope="module")
def stocked(finished: Finished) -> Finished:
    """With a data set of a user."""
    finished[0].put("/datasets/mine", content=make_npz(images=GRIDS)).raise_for_status()
    return finished


@pytest.mark.parametrize("path", sorted(set(list_gets())))
def test_head_is_answered_as_get_without_a_body(stocked: Finished, path: str) -> None:
    client, ids = stocked
    url = fill_in(path, job_id=ids["b"])
    got = client.get(url, headers={"Accept-Encoding": "identity"})
    head = client.head(url, headers={"Accept-Encoding": "identity"})
    assert head.status_code == got.status_code
    assert head.content == b""
    varying = {"x-request-id", "date", "etag", "content-length"}
    kept = {name: value for name, value in got.headers.items() if name not in varying}
    assert {name: head.headers.get(name) for name in kept} == kept


def test_every_kind_of_answer_is_among_those() -> None:
    assert {"/", "/docs", "/healthz", "/jobs", "/metrics", "/openapi.json"} <= set(list_gets())
    assert any(path.endswith("checkpoints/{epoch}") for path in list_gets())
    assert any(path.endswith("curves.png") for path in list_gets())


def test_head_of_a_live_stream_ends_at_once(client: TestClient, submit_job: SubmitJob) -> None:
    url = f"/jobs/{submit_job().id}/events"
    answer = client.head(url, headers={"Accept": "text/event-stream"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    feed = client.app.state.event_feed  # type: ignore[attr-defined]
    assert feed.num_streams == 0


def test_head_is_not_allowed_where_get_is_not(client: TestClient, submit_job: SubmitJob) -> None:
    answer = client.head(f"/jobs/{submit_job().id}/cancel")
    assert answer.status_code == 405
    assert answer.content == b""
    assert client.delete("/jobs").headers["allow"] == "GET, HEAD, POST"


def test_head_of_a_page_leads_to_the_login_and_back(guarded: TestClient) -> None:
    answer = guarded.head("/ui/jobs/new?option=a")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/ui/login?next=%2Fui%2Fjobs%2Fnew%3Foption%3Da"
    assert guarded.head("/jobs").status_code == 401


def test_head_counts_towards_the_rate_limit(settings: Settings) -> None:
    with open_client(create_app(settings.model_copy(update={"rate_limit": "2/hour"}))) as client:
        statuses = [client.head("/jobs").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_head_adds_no_operation_to_the_description(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path, operations in paths.items() if "head" in operations]


# -- bodies

JSON_ROUTES = [
    ("POST", "/jobs", {"option": "b"}),
    ("POST", "/jobs/{job_id}/resume", {"epochs": 3}),
    ("PATCH", "/jobs/{job_id}", {"is_pinned": True}),
    ("PUT", "/options/{name}", {"base": "b"}),
    ("POST", "/studies", {"options": ["a"]}),
    ("POST", "/studies/{study_id}/seeds", {"num": 1}),
]


@pytest.mark.parametrize(("method", "path", "body"), JSON_ROUTES)
@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ],
)
def test_json_of_another_type_is_told_its_header(
    client: TestClient,
    submit_job: SubmitJob,
    method: str,
    path: str,
    body: dict[str, Any],
    media_type: str | None,
) -> None:
    url = fill_in(path, job_id=submit_job().id)
    headers = {} if media_type is None else {"Content-Type": media_type}
    answer = client.request(method, url, content=json.dumps(body).encode(), headers=headers)
    detail = problem(answer, 415)["detail"]
    assert "send it with Content-Type: application/json" in detail
    assert (media_type or "which is missing").partition(";")[0] in detail


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8",
                                        "application/merge-patch+json"])  # fmt: skip
def test_json_is_taken_by_any_of_its_names(client: TestClient, media_type: str) -> None:
    headers = {"Content-Type": media_type}
    answer = client.post("/jobs", content=b'{"option": "b"}', headers=headers)
    assert answer.status_code == 201, answer.text


def test_every_route_with_a_json_body_is_tried() -> None:
    """So that a new one is not left with the framework's words."""
    paths = create_app(Settings()).openapi()["paths"]
    with_json = {
        (method.upper(), path)
        for path, operations in paths.items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
        and not path.startswith("/datasets/")  # a file, of whatever kind
    }
    tried = {
        (method, path.replace("/options/mine", "/options/{name}"))
        for method, path, _ in JSON_ROUTES
    }
    assert with_json == tried


@pytest.mark.parametrize("body", [b"[]", b'"b"', b"3", b"null", b"true", b"", b"[{}]"])
def test_body_that_is_no_object_is_told_so(client: TestClient, body: bytes) -> None:
    answer = client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert problem(answer, 422)["errors"] == [
        {"field": "body", "message": 'must be a JSON object, such as {"name": "value"}'}
    ]


@pytest.mark.parametrize("body", [b"\xff\xfe\x00", b"\x80", b'{"a": "\xff"}'])
def test_body_that_is_no_text_is_told_so(client: TestClient, body: bytes) -> None:
    answer = client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert "JSON" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/jobs"), ("PUT", "/datasets/x"), ("POST", "/ui/jobs"), ("PATCH", "/jobs/x")],
)
@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip"])
def test_compressed_body_is_named(
    client: TestClient, method: str, path: str, encoding: str
) -> None:
    headers = {"Content-Encoding": encoding, "Sec-Fetch-Site": "same-origin"}
    answer = client.request(method, path, content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415
    assert f"Content-Encoding: {encoding.lower()}" in answer.text


def test_request_without_a_body_needs_no_type(client: TestClient, submit_job: SubmitJob) -> None:
    assert client.post(f"/jobs/{submit_job().id}/cancel").status_code == 200


# -- the path of a reverse proxy


#: What answers no GET.
FORMS = ("/cancel", "/pause", "/resume", "/delete", "/seeds", "/logout", "/ui/jobs", "/ui/studies")


class Links(HTMLParser):
    """Every address in a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(html)

    def handle_starttag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = ("href", "src", "action", "formaction", "data-preview")
        self.found |= {value for name, value in attributes if name in names and value}


class Proxy:
    """A reverse proxy that serves an application below a path: it takes the path off, or leaves it,
    and the application knows it by its settings, or by a header."""

    def __init__(self, client: TestClient, *, strips: bool, headers: dict[str, str]) -> None:
        self.client = client
        self.client.follow_redirects = False
        self._strips = strips
        self._headers = headers

    def ask(self, method: str, address: str, **kwargs: Any) -> Response:
        assert (address + "/").startswith(f"{PREFIX}/"), f"{address} leads out of {PREFIX}/"
        path = address.removeprefix(PREFIX) or "/" if self._strips else address
        headers = {**self._headers, "Sec-Fetch-Site": "same-origin", **kwargs.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **kwargs)

    def follow(self, answer: Response) -> Response:
        """What a redirect leads to."""
        assert answer.status_code in (303, 307), answer.text
        return self.ask("GET", answer.headers["location"])


@pytest.fixture(params=["setting", "header"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["strips", "leaves"])
def proxy(
    request: pytest.FixtureRequest, finished: Finished, tmp_path: Path, source: str
) -> Iterator[Proxy]:
    original: Settings = finished[0].app.state.settings  # type: ignore[attr-defined]
    settings = copy_settings(original, tmp_path / "experiments")
    headers = {"X-Forwarded-Prefix": f"{PREFIX}/"} if source == "header" else {}
    if source == "setting":
        settings = settings.model_copy(update={"root_path": PREFIX})
    with open_client(create_app(settings)) as client:
        yield Proxy(client, strips=request.param, headers=headers)


@pytest.mark.parametrize("source", ["header"])
@pytest.mark.parametrize("proxy", [True], indirect=True)
def test_every_link_of_every_page_stays_below_the_path(proxy: Proxy, finished: Finished) -> None:
    """Every kind of page is visited that can be reached by links, and all that it loads."""
    study = proxy.ask("POST", f"{PREFIX}/studies", json={"options": ["a", "b"], "config": TINY})
    assert study.status_code == 201
    pages = ["/", f"/ui/jobs/{finished[1]['b']}", f"/ui/studies/{study.json()['id']}",
             "/ui/compare?options=a,b,c"]  # fmt: skip
    waiting = [f"{PREFIX}{page}" for page in pages]
    seen: dict[str, str] = {}  # by kind
    while waiting:
        address = waiting.pop(0)
        if name_kind(address) in seen or address.endswith(FORMS):
            continue
        seen[name_kind(address)] = address
        answer = proxy.ask("GET", address)
        assert answer.status_code == 200, address
        if answer.headers["content-type"].startswith("text/html"):
            assert f'data-root="{PREFIX}"' in answer.text or "report" in address
            links = {link.partition("#")[0] for link in Links(answer.text).found}
            links = {link for link in links if link and not link.startswith("data:")}
            outside = [link for link in links if not re.match(rf"{PREFIX}([/?]|$)", link)]
            assert outside == [], address
            waiting += sorted(links)
    assert {f"{PREFIX}/docs", f"{PREFIX}/ui/jobs/new"} <= set(seen.values())
    assert len([address for address in seen if "/static/" in address]) >= 8
    assert len(seen) > 25, seen


def name_kind(address: str) -> str:
    """Addresses of one kind differ only in ids, numbers and what is asked for."""
    return re.sub(r"/([0-9a-f]{12,}|[0-9]+)\b", "/*", address.partition("?")[0])


def test_first_page_opens_with_and_without_its_slash(proxy: Proxy) -> None:
    for address in (PREFIX, f"{PREFIX}/"):
        assert proxy.ask("GET", address).status_code == 200


def test_every_address_in_an_answer_stays_below_the_path(proxy: Proxy, finished: Finished) -> None:
    job_id = finished[1]["b"]
    dataset = proxy.ask("PUT", f"{PREFIX}/datasets/own", content=make_npz(images=GRIDS))
    posted = proxy.ask(
        "POST", f"{PREFIX}/jobs", json={"option": "b"}, headers={"Idempotency-Key": "k"}
    )
    again = proxy.ask(
        "POST", f"{PREFIX}/jobs", json={"option": "b"}, headers={"Idempotency-Key": "k"}
    )
    option = proxy.ask("PUT", f"{PREFIX}/options/mine", json={"base": "b"})
    study = proxy.ask("POST", f"{PREFIX}/studies", json={"options": ["a"]})
    for answer in (dataset, posted, again, option, study):
        assert answer.status_code == 201, answer.text
        assert proxy.ask("GET", answer.headers["location"]).status_code == 200
    addresses = set()
    for path in (
        f"/jobs/{job_id}", f"/jobs/{job_id}/reconstructions", f"/jobs/{job_id}/checkpoints",
        f"/jobs/{job_id}/events", "/datasets/own", "/datasets", "/options", "/studies", "/workers",
        f"/comparisons?job_id={job_id}", f"/jobs/{job_id}/verdict",
    ):  # fmt: skip
        addresses |= set(find_paths(proxy.ask("GET", f"{PREFIX}{path}").json()))
    assert len(addresses) >= 5
    for address in addresses:
        assert proxy.ask("GET", address).status_code == 200, address
    missing = proxy.ask("GET", f"{PREFIX}/jobs/none")
    assert missing.json()["instance"] == f"{PREFIX}/jobs/none"


def find_paths(value: Any) -> Iterator[str]:
    """Every text of a JSON answer that is a path."""
    match value:
        case dict():
            for each in value.values():
                yield from find_paths(each)
        case list():
            for each in value:
                yield from find_paths(each)
        case str() if re.match(r"/[a-z]", value):
            yield value


def test_every_redirect_stays_below_the_path(proxy: Proxy, finished: Finished) -> None:
    job_id = finished[1]["a"]
    posted = proxy.ask("POST", f"{PREFIX}/ui/jobs", data={"option": "a"})
    assert proxy.follow(posted).status_code == 200
    new_id = posted.headers["location"].rpartition("/")[2]
    for action, data in (("cancel", {}), ("resume", {"next": "/?status=queued"})):
        changed = proxy.ask("POST", f"{PREFIX}/ui/jobs/{new_id}/{action}", data=data)
        assert proxy.follow(changed).status_code == 200
    assert proxy.follow(proxy.ask("GET", f"{PREFIX}/jobs/")).status_code == 200
    study = proxy.ask("POST", f"{PREFIX}/ui/studies", data={"options": ["a"], "num_seeds": "1"})
    assert proxy.follow(study).status_code == 200
    answer = proxy.ask("GET", f"{PREFIX}/ui/login?next=/ui/jobs/{job_id}")
    assert proxy.follow(answer).status_code == 200


def test_login_leads_back_to_where_it_was_asked_for(proxy: Proxy) -> None:
    settings = proxy.client.app.state.settings  # type: ignore[attr-defined]
    own = settings.model_copy(update={"api_token": SecretStr(TOKEN)})
    with open_client(create_app(own)) as client:
        proxy.client, client.follow_redirects = client, False
        asked = proxy.ask("GET", f"{PREFIX}/ui/jobs/new?option=a")
        login = proxy.follow(asked)
        (action,) = [link for link in Links(login.text).found if link.endswith("/ui/login")]
        target = re.search(r'name="next" value="([^"]*)"', login.text)
        assert target is not None
        sent = {"token": TOKEN, "next": target[1].replace("&amp;", "&")}
        answer = proxy.ask("POST", action, data=sent)
        assert answer.headers["location"] == f"{PREFIX}/ui/jobs/new?option=a"
        cookie = answer.headers["set-cookie"]
        # The browser sends the token nowhere else on this host.
        assert f"Path={PREFIX};" in cookie
        kept = {"Cookie": cookie.partition(";")[0]}
        assert proxy.ask("GET", f"{PREFIX}/", headers=kept).status_code == 200
        gone = proxy.ask("POST", f"{PREFIX}/ui/logout", headers=kept)
        assert f"Path={PREFIX};" in gone.headers["set-cookie"]
        assert gone.headers["location"] == f"{PREFIX}/ui/login"


def test_description_names_the_path_as_its_server(proxy: Proxy) -> None:
    description = proxy.ask("GET", f"{PREFIX}/openapi.json").json()
    assert description["servers"] == [{"url": PREFIX}]
    if not proxy.client.app.state.settings.root_path:  # type: ignore[attr-defined]
        assert "servers" not in proxy.client.get("/openapi.json").json()


def test_commands_on_pages_have_the_whole_address(client: TestClient) -> None:
    headers = {"X-Forwarded-Prefix": PREFIX}
    for page, path in (("/", "jobs"), ("/ui/studies", "studies")):
        assert f"curl -s http://localhost{PREFIX}/{path} " in client.get(page, headers=headers).text


def test_scripts_have_no_path_of_their_own() -> None:
    """They begin every address with the page's root."""
    first = "|".join(re.escape(part) for part in FIRST_PARTS)
    for path in (ROOT / "server/dashboard/static").glob("*.js"):
        assert re.findall(rf"[\"'`]/(?:{first})\b", path.read_text()) == [], path.name


def test_paths_of_all_routes_are_known() -> None:
    pages = {route.path.split("/")[1] for route in PAGES}
    routes = {path.split("/")[1] for _, path in list_requests()}
    assert pages | routes - {"nowhere"} | {"static"} == FIRST_PARTS | {""}


@pytest.mark.parametrize(
    "prefix",
    [
        *[
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "/a/../b",
            "nowhere",
            "/a b",
        ],
        *["/a?b", '/"><script>', "/" + "a" * 200, "/a" * 40],
    ],
)
def test_header_that_is_no_path_is_passed_over(client: TestClient, prefix: str) -> None:
    page = client.get("/", headers={"X-Forwarded-Prefix": prefix})
    assert page.status_code == 200
    assert 'data-root=""' in page.text
    assert prefix not in page.text


def test_setting_comes_before_the_header(settings: Settings) -> None:
    own = settings.model_copy(update={"root_path": PREFIX})
    with open_client(create_app(own)) as client:
        page = client.get("/", headers={"X-Forwarded-Prefix": "/other"})
    assert f'data-root="{PREFIX}"' in page.text


def test_prefix_like_a_route_of_ours_is_taken_off_by_the_proxy(
    client: TestClient, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    headers = {"X-Forwarded-Prefix": "/jobs"}
    assert client.get(f"/jobs/{job_id}", headers=headers).json()["id"] == job_id
    assert 'href="/jobs/ui/studies"' in client.get("/", headers=headers).text


@pytest.mark.parametrize("path", ["//jobs", f"{PREFIX}//jobs", "///jobs", f"//{PREFIX}/jobs"])
def test_one_slash_too_many_of_a_proxy_is_passed_over(client: TestClient, path: str) -> None:
    headers = {"X-Forwarded-Prefix": PREFIX}
    answer = client.request("GET", f"http://localhost{path}", headers=headers)
    assert answer.json()["data"] == []


def test_slashes_before_another_host_lead_nowhere(client: TestClient) -> None:
    for path in ("//evil.example/", "//evil.example/jobs/", "//jobs/"):
        answer = client.get(f"http://localhost{path}", follow_redirects=False)
        assert answer.headers.get("location", "/jobs") == "/jobs"


def test_one_request_leaves_no_prefix_to_the_next(client: TestClient) -> None:
    assert 'data-root="/a"' in client.get("/", headers={"X-Forwarded-Prefix": "/a"}).text
    assert 'data-root=""' in client.get("/").text


def test_health_and_limits_know_their_paths_below_the_prefix(settings: Settings) -> None:
    own = settings.model_copy(
        update={"root_path": PREFIX, "rate_limit": "1/hour", "api_token": SecretStr(TOKEN)}
    )
    with open_client(create_app(own)) as client:
        for _ in range(3):
            assert client.get(f"{PREFIX}/healthz", headers={"Host": "10.0.0.7"}).status_code == 200
        assert client.get(f"{PREFIX}/jobs").status_code == 401
