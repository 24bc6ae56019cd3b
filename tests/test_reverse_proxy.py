"""Behind a real nginx: its default `Host`, ports, a path, TLS, gzip, live streams and uploads."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from commands import assert_one_line, run
from conftest import TINY, MakeSettings
from nginx import NEEDS_NGINX, adapt, make_certificate, read_documented, running_nginx
from npz_files import GRIDS, make_npz
from pydantic import SecretStr
from test_door import Links
from test_events import find_free_port

from server.api.event_feed import EventFeed
from server.cli.processes import ServerThread
from server.client import LosslabClient, RequestError
from server.settings import Settings

pytestmark = NEEDS_NGINX

TOKEN = "a-long-and-secret-token"
KEEP_ALIVE_SECONDS = 0.4
#: What nginx waits for between two pieces of an answer; its default is 60 s.
READ_SECONDS = 2
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
#: As one finds it: no header is set.
PLAIN = """\
server {
    listen 80;
    location / { proxy_pass http://127.0.0.1:8000; }
}
"""
#: As many write it: the name without its port.
WITHOUT_PORT = PLAIN.replace("; }", "; proxy_set_header Host $host; }")
PACKED = PLAIN.replace("location", "gzip on; gzip_proxied any; gzip_types *; location")
WITH_TLS = """\
server {
    listen 443 ssl;
    ssl_certificate /x; ssl_certificate_key /x;
    location / { proxy_pass http://127.0.0.1:8000; }
}
"""


@dataclass(frozen=True)
class Front:
    """What a browser or a client sees of a service behind nginx."""

    base: str
    settings: Settings
    certificate: Path | None

    @property
    def origin(self) -> str:
        return "/".join(self.base.split("/")[:3])

    @property
    def trust(self) -> ssl.SSLContext | bool:
        if self.certificate is None:
            return False
        return ssl.create_default_context(cafile=self.certificate)

    def open(self) -> httpx.Client:
        return httpx.Client(base_url=self.base, verify=self.trust, trust_env=False, timeout=20)

    def log_in(self, browser: httpx.Client, **headers: str) -> httpx.Response:
        """Send the login's form as a browser does."""
        page = browser.get("/ui/login")
        assert page.status_code == 200
        (action,) = [link for link in Links(page.text).found if link.endswith("/ui/login")]
        sent = {"Origin": self.origin, **headers}
        return browser.post(f"{self.origin}{action}", data={"token": TOKEN}, headers=sent)


Serve = Callable[..., "contextmanager[Front]"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path, names=["localhost", "lab.example.org", "example.org"])


@pytest.fixture
def serve(tmp_path: Path, make_settings: MakeSettings) -> Iterator[Serve]:
    """A service behind nginx, which runs with a block."""

    @contextmanager
    def start(
        block: str, *, path: str = "", certificate: Path | None = None, **changes: object
    ) -> Iterator[Front]:
        settings = make_settings(tmp_path / "experiments").model_copy(
            update={"port": 0, "api_token": SecretStr(TOKEN), **changes}
        )
        server = ServerThread(settings, log_level="warning")
        server.start()
        upstream, port = int(server.url.rpartition(":")[2]), find_free_port()
        adapted = adapt(block, port=port, upstream=upstream, certificate=certificate)
        server._app.state.event_feed._keep_alive_seconds = KEEP_ALIVE_SECONDS
        scheme = "https" if certificate else "http"
        try:
            with running_nginx(tmp_path, adapted, port=port):
                yield Front(f"{scheme}://localhost:{port}{path}", settings, certificate)
        finally:
            server.stop()

    yield start


SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize("block", [PLAIN, WITHOUT_PORT], ids=["default", "without port"])
def test_login_and_forms_work_though_nginx_sets_the_host(serve: Serve, block: str) -> None:
    with serve(block) as front, front.open() as browser:
        assert front.log_in(browser, **SAME).status_code == 303
        assert browser.get("/").status_code == 200
        sent = {"Origin": front.origin, **SAME}
        assert browser.post("/ui/jobs", data={"option": "a"}, headers=sent).status_code == 303
        assert browser.post("/jobs", json={"option": "a"}, headers=sent).status_code == 201
        foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert browser.post("/jobs", json={"option": "a"}, headers=foreign).status_code == 403


def test_page_of_an_old_browser_is_told_of_the_proxys_host(serve: Serve) -> None:
    """One that does not say where a form comes from, as all of them at addresses without TLS."""
    with serve(PLAIN) as front, front.open() as browser:
        refused = front.log_in(browser)
        assert refused.status_code == 403
        assert "proxy_set_header Host $http_host" in refused.text
    passed_on = PLAIN.replace("; }", "; proxy_set_header Host $http_host; }")
    with serve(passed_on) as front, front.open() as browser:
        assert front.log_in(browser).status_code == 303


def test_documented_host_of_its_own(serve: Serve, certificate: Path) -> None:
    block = read_documented("lab.example.org")
    hosts = ("lab.example.org", "localhost")
    with (
        serve(block, certificate=certificate, allowed_hosts=hosts) as front,
        front.open() as browser,
    ):
        login = front.log_in(browser)
        assert login.status_code == 303
        assert "Secure" in login.headers["set-cookie"]
        assert browser.get("/").status_code == 200
        # Larger than what nginx takes by default.
        content = make_npz(images=GRIDS.repeat(1000, axis=0))
        assert len(content) > 2**20
        uploaded = browser.put("/datasets/large", content=content, headers=AUTHORIZED)
        assert uploaded.status_code == 201, uploaded.text
        assert browser.get("/jobs", headers={"Host": "evil.example"}).status_code == 421
        assert browser.get("/jobs", headers={"Host": "LAB.example.org"}).status_code == 200


@pytest.mark.parametrize("is_stripped", [True, False])
@pytest.mark.parametrize("is_set", [True, False])
def test_documented_path(serve: Serve, certificate: Path, is_stripped: bool, is_set: bool) -> None:
    """Whether nginx takes the path off or leaves it, says it in its header or a setting does."""
    block = read_documented("example.org")
    if not is_stripped:
        block = block.replace(":8000/;", ":8000;")
    if is_set:
        block = block.replace("proxy_set_header X-Forwarded-Prefix /losslab;", "")
    root_path = "/losslab" if is_set else ""
    with (
        serve(block, path="/losslab", certificate=certificate, root_path=root_path) as front,
        front.open() as browser,
    ):
        login = front.log_in(browser)
        assert login.headers["location"] == "/losslab/"
        assert "Path=/losslab;" in login.headers["set-cookie"]
        page = browser.get("/")
        assert page.status_code == 200
        for link in Links(page.text).found - {"#main"}:
            assert link.startswith("/losslab/"), link
            if not link.endswith(("/ui/logout", "/ui/jobs")):
                assert browser.get(f"{front.origin}{link}").status_code == 200, link
        posted = browser.post("/jobs", json={"option": "b"}, headers=AUTHORIZED)
        assert posted.headers["location"] == f"/losslab/jobs/{posted.json()['id']}"
        assert browser.get(f"{front.origin}{posted.headers['location']}").status_code == 200


def test_command_line_and_client_work_below_a_path_with_tls(
    serve: Serve, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = read_documented("example.org")
    with serve(block, path="/losslab", certificate=certificate) as front:
        asked = {"LOSSLAB_URL": front.base, "LOSSLAB_API_TOKEN": TOKEN}
        done = run("jobs", **asked)
        assert_one_line(done, code=1, words="SSL_CERT_FILE may name the certificate")
        done = run("jobs", "--json", SSL_CERT_FILE=str(certificate), **asked)
        assert done.returncode == 0, done.stderr
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with LosslabClient(front.base, token=TOKEN) as client:
            job = client.create_job("b", **TINY)
            assert client.read_job(job["id"])["id"] == job["id"]
        plain = front.base.replace("https:", "http:")
        with LosslabClient(plain, token=TOKEN) as client, pytest.raises(RequestError) as told:
            client.list_jobs()
        assert "a proxy stands before it" in str(told.value)


def test_answer_of_nginx_itself_is_told_apart(serve: Serve) -> None:
    with (
        serve(PLAIN) as front,
        LosslabClient(front.base, token=TOKEN) as client,
        pytest.raises(RequestError, match="answered 413, and not in Losslab's words"),
    ):
        client._request("PUT", "/datasets/large", content=bytes(2**21))


@pytest.mark.parametrize("block", [PLAIN, PACKED], ids=["plain", "gzip"])
def test_answers_come_through_whole(serve: Serve, block: str) -> None:
    with serve(block) as front, front.open() as client:
        client.headers.update(AUTHORIZED)
        direct = client.get("/openapi.json", headers={"Accept-Encoding": "identity"})
        packed = client.get("/openapi.json", headers={"Accept-Encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.json() == direct.json()
        page = client.get("/", headers={"Accept-Encoding": "gzip"})
        assert page.headers["content-encoding"] == "gzip"
        script = next(link for link in Links(page.text).found if link.endswith("/dashboard.js"))
        assert client.get(script).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/", "/jobs", "/docs", "/metrics", "/readyz"])
def test_monitors_may_ask_by_head(serve: Serve, path: str) -> None:
    with serve(PLAIN) as front, front.open() as client:
        client.headers.update(AUTHORIZED)
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")


@pytest.mark.parametrize(
    ("block", "has_tls"),
    [(PACKED, False), (WITH_TLS, True)],
    ids=["gzip", "tls"],
)
def test_live_stream_outlasts_what_nginx_waits_for(
    serve: Serve, certificate: Path, block: str, has_tls: bool
) -> None:
    """A quiet job's stream is held by its comments, and each event comes at once."""
    block = block.replace("; }", f"; proxy_read_timeout {READ_SECONDS}s; }}")
    with (
        serve(block, certificate=certificate if has_tls else None) as front,
        front.open() as client,
    ):
        client.headers.update(AUTHORIZED)
        job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
        stream = {"Accept": "text/event-stream"}
        with client.stream("GET", f"/jobs/{job_id}/events", headers=stream) as answer:
            assert answer.status_code == 200
            started = time.monotonic()
            lines = answer.iter_lines()
            num_pings = 0
            while time.monotonic() - started < 2 * READ_SECONDS:
                num_pings += next(lines).startswith(":")
            assert num_pings > READ_SECONDS / KEEP_ALIVE_SECONDS
            cancelled_at = time.monotonic()
            client.post(f"/jobs/{job_id}/cancel")
            assert "event: end" in list(lines)
            assert time.monotonic() - cancelled_at < READ_SECONDS


def test_default_keep_alive_is_well_within_what_proxies_wait_for() -> None:
    feed = EventFeed(engine=None)  # type: ignore[arg-type] # which is not asked
    assert feed._keep_alive_seconds <= 60 / 3


def test_head_of_a_live_stream_ends_at_once(serve: Serve) -> None:
    with serve(PLAIN) as front, front.open() as client:
        client.headers.update(AUTHORIZED)
        job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
        started = time.monotonic()
        answer = client.head(f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
        assert answer.status_code == 200
        assert time.monotonic() - started < 5
