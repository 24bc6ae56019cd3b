"""The client and what the environment says about proxies and certificates."""

import os
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from commands import assert_one_line, run
from hypothesis import given, settings
from hypothesis import strategies as st

from server.client import LosslabClient, RequestError
from server.environment.proxies import find_proxy, load_certificates
from server.errors import LosslabError

SERVICE = "http://lab.invalid:8000"
PASSWORD = "Zq9-marked-secret"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def find(url: str = SERVICE) -> str | None:
    proxy = find_proxy(httpx.URL(url))
    return None if proxy is None else f"{proxy.variable} {proxy.url}"


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("HTTP_PROXY", "http://proxy:3128", "HTTP_PROXY http://proxy:3128"),
        ("http_proxy", "http://proxy:3128", "http_proxy http://proxy:3128"),
        ("HTTP_PROXY", " 'http://proxy:3128'\r", "HTTP_PROXY http://proxy:3128"),
        ("HTTP_PROXY", "proxy:3128", "HTTP_PROXY http://proxy:3128"),
        ("ALL_PROXY", "https://u:p@proxy", "ALL_PROXY https://u:p@proxy"),
        ("HTTPS_PROXY", "http://proxy:3128", None),
        ("HTTP_PROXY", "", None),
    ],
)
def test_proxy_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, found: str | None
) -> None:
    monkeypatch.setenv(name, value)
    assert find() == found


@pytest.mark.parametrize(
    ("url", "listed"),
    [
        ("http://lab.invalid:8000", "lab.invalid"),
        ("http://lab.invalid:8000", "other, .invalid"),
        ("http://lab.invalid", "*"),
        ("http://10.1.2.3:8000", "localhost,10.0.0.0/8"),
        ("http://10.1.2.3", "10.1.2.3"),
        ("http://[fd07::5]:8000", "localhost,fd07::/64"),
        ("http://[fd07::5]", "[fd07::5]"),
        ("http://127.0.0.1:8000", ""),
        ("http://localhost:8000", ""),
        ("http://[::1]:8000", ""),
    ],
)
def test_proxy_is_passed_by(monkeypatch: pytest.MonkeyPatch, url: str, listed: str) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", listed)
    assert find(url) is None


@pytest.mark.parametrize(
    "listed", ["localhost,fd07::/64", "[::1]", "10.0.0.0/8", "a b", "/", ":", ","]
)
def test_other_hosts_keep_their_proxy(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", listed)
    assert find() is not None
    assert find("http://[fd08::5]") is not None


@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (f"socks4://u:{PASSWORD}@127.0.0.1:1", "must begin with http://"),
        (f"proxi://u:{PASSWORD}@127.0.0.1:1", "must begin with http://"),
        (f"http://u:{PASSWORD}@127.0.0.1:port", "is no proxy's URL"),
        (f"socks5://u:{PASSWORD}@127.0.0.1:1", "pip install 'httpx[socks]'"),
        (f"socks5h://u:{PASSWORD}@127.0.0.1:1", "pip install 'httpx[socks]'"),
    ],
)
def test_proxy_that_cannot_be_used_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RequestError) as refused:
        LosslabClient(SERVICE)
    assert f"{name} " in str(refused.value)
    assert words in str(refused.value)
    assert "add lab.invalid to NO_PROXY" in str(refused.value)
    assert PASSWORD not in str(refused.value)
    monkeypatch.setenv("NO_PROXY", "lab.invalid")
    LosslabClient(SERVICE).close()


def test_proxy_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://u:{PASSWORD}@127.0.0.1:1")
    with LosslabClient(SERVICE) as client, pytest.raises(RequestError) as refused:
        client.list_jobs()
    assert "through the proxy of HTTP_PROXY" in str(refused.value)
    assert PASSWORD not in str(refused.value)


class _Proxy(BaseHTTPRequestHandler):
    """Answers what a proxy is asked: whole addresses."""

    def do_GET(self) -> None:
        body = b'{"data": [], "has_more": false}'
        self.send_response(200 if self.path.startswith("http://lab.invalid:8000/") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Not to the tests' output."""


@pytest.fixture
def proxy_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_client_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch, proxy_url: str) -> None:
    monkeypatch.setenv("http_proxy", f"{proxy_url}\r")
    monkeypatch.setenv("NO_PROXY", "localhost,fd07::/64")
    with LosslabClient(SERVICE) as client:
        assert client.list_jobs()["data"] == []


# -- certificates


@pytest.mark.parametrize("url", [SERVICE, "http://127.0.0.1:8000"])
def test_certificates_are_not_read_where_nothing_is_encrypted(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
    assert load_certificates(httpx.URL(url)) is False


@pytest.mark.parametrize(
    ("content", "words"), [(None, "it does not exist"), ("", "it has no certificates")]
)
def test_file_of_certificates_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "such.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(RequestError) as refused:
        LosslabClient("https://lab.invalid")
    assert f"SSL_CERT_FILE cannot be used: {path}: {words}" in str(refused.value)


def test_file_of_tls_keys_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    monkeypatch.setenv("SSLKEYLOGFILE", "/no/such/keys")
    with pytest.raises(RequestError, match="SSLKEYLOGFILE cannot be used: /no/such/keys: "):
        LosslabClient("https://lab.invalid")


def test_good_certificates_are_loaded() -> None:
    context = load_certificates(httpx.URL("https://lab.invalid"))
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED


# -- the library


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*VARIABLES, *map(str.upper, VARIABLES), "SSL_CERT_FILE", "SSL_CERT_DIR"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
        | st.sampled_from(["socks5://x:1", "http://[", "::", "[::1]", "*", "http://a:b@c:d"]),
        max_size=3,
    ),
    st.sampled_from([SERVICE, "https://lab.invalid", "http://[fd07::1]:8000"]) | st.text(),
    st.none() | st.text(max_size=20),
)
def test_only_own_errors_leave_the_client(
    variables: dict[str, str], url: str, token: str | None
) -> None:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        LosslabClient(url, token=token).close()
    except LosslabError as error:
        assert "\n" not in str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.create_job("b", epochs=object()),
        lambda client: client.create_job("b", name="\ud800"),
        lambda client: client.create_job("b", beta=float("inf")),
        lambda client: client.list_jobs(name="\ud800"),
        lambda client: client.create_study(["a"], idempotency_key="ä"),
        lambda client: client.read_job("\x00" * 70_000),
        lambda client: (client.close(), client.list_jobs()),
    ],
)
def test_only_own_errors_leave_a_request(ask: object) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
    assert callable(ask)
    with LosslabClient(SERVICE, transport=transport) as client, pytest.raises(RequestError):
        ask(client)


def test_header_that_cannot_be_sent_is_not_quoted(proxy_url: str) -> None:
    with LosslabClient(proxy_url) as client, pytest.raises(RequestError) as refused:
        client.create_study(["a"], idempotency_key=f"{PASSWORD}\nx")
    assert "a header has letters that HTTP does not allow" in str(refused.value)
    assert PASSWORD not in str(refused.value)


def test_password_in_the_address_is_not_shown() -> None:
    url = f"http://anna:{PASSWORD}@127.0.0.1:1"
    with LosslabClient(url) as client:
        assert client.base_url == "http://127.0.0.1:1"
        with pytest.raises(RequestError) as refused:
            client.list_jobs()
    assert PASSWORD not in str(refused.value) + repr(refused.value)
    transport = httpx.MockTransport(lambda _: httpx.Response(502, text="<html>"))
    with LosslabClient(url, transport=transport) as client, pytest.raises(RequestError) as refused:
        client.list_jobs()
    assert PASSWORD not in str(refused.value)


def test_redirect_of_a_proxy_says_where_the_service_is() -> None:
    answer = httpx.Response(301, headers={"Location": "https://lab.example.org/jobs"})
    transport = httpx.MockTransport(lambda _: answer)
    with LosslabClient(SERVICE, transport=transport) as client, pytest.raises(RequestError) as told:
        client.list_jobs()
    assert "leads to https://lab.example.org/jobs; set LOSSLAB_URL" in str(told.value)


# -- the command line


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("NO_PROXY", "localhost,fd07::/64", "did not answer"),
        ("ALL_PROXY", "socks5://127.0.0.1:1", "ALL_PROXY names a SOCKS proxy"),
        ("HTTP_PROXY", "proxi://127.0.0.1:1", "HTTP_PROXY must begin with"),
        ("SSL_CERT_FILE", "/no/such.pem", "did not answer"),
    ],
)
def test_command_says_it_in_one_line(name: str, value: str, words: str) -> None:
    done = run("jobs", LOSSLAB_URL=SERVICE, **{name: value})
    assert_one_line(done, code=1, words=words)
