"""Malicious paths, bodies, content types and names are refused and change nothing."""

import html
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from conftest import TINY, drain, problem
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from stored_state import State, read_state

from server.api.bodies import MAX_BODY_BYTES, InertJson
from server.settings import Settings

Finished = tuple[TestClient, dict[str, str]]

UP = [
    *(
        "../",
        "..%2f",
        "%2e%2e/",
        "%2e%2e%2f",
        "..%252f",
        "%252e%252e%252f",
        "%25252e%25252e%25252f",
    ),
    *("..%5c", "..%255c", "%2e%2e%5c", "..;/", "..;%2f", "..%00/", "%00../", "....//", "..//"),
    *("%c0%ae%c0%ae%c0%af", "..%c0%af", "%uff0e%uff0e/", "..%ef%bc%8f", "/..%2f", "%2f..%2f"),
]
TARGETS = ["etc/passwd", "losslab.db", "job.log"]
JSON = {"Content-Type": "application/json"}
XSS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'onmouseover='alert(1)",
    "</title></textarea></script><svg/onload=alert(1)>",
    "{{ 7*7 }}{% for x in y %}",
    "javascript:alert(1)",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "</script><!--<script>",
    "\u202eevil\u2028<b>",
]
CONTROLS = set("\u202e\u2028\x9b\x7f")


def state_of(client: TestClient) -> State:
    state = client.app.state  # type: ignore[attr-defined]
    return read_state(state.engine, state.settings)


@pytest.mark.parametrize("up", UP)
def test_no_path_leads_out_of_the_folders(finished: Finished, up: str) -> None:
    client, ids = finished
    before = state_of(client)
    base = f"/jobs/{ids['b']}"
    for target in TARGETS:
        away = 4 * up + target
        for url in (
            *(f"{base}/checkpoints/{away}", f"{base}/reconstructions/{away}.png"),
            *(f"/jobs/{away}", f"/jobs/{away}/log", f"/datasets/{away}", f"/static/{away}"),
            f"/options/{away}",
            *(f"/datasets/{away}/preview.png", f"/static/0000000000000000/{away}"),
        ):
            for method in ("GET", "DELETE"):
                answer = client.request(method, url)
                assert answer.status_code in (404, 405, 422), (method, url)
                assert b"root:" not in answer.content
                assert b"SQLite format" not in answer.content
    assert state_of(client) == before


@pytest.mark.parametrize(
    "name",
    [
        *("../mine", "/etc/passwd", "C:\\x", "..", ".", "mine.npz", "a/b", "a\\b", "a b", "-x"),
        *(
            "a\x00b",
            "a\nb",
            "\uff0e\uff0e\uff0fx",
            "é",
            "x" * 65,
            "",
            "~root",
            "$HOME",
            "file:///x",
        ),
        *("http://169.254.169.254/latest", "a;b", "a%2fb", "_x", "nul\x00"),
    ],
)
def test_name_of_a_data_set_is_no_path(
    client: TestClient, engine: Engine, settings: Settings, name: str
) -> None:
    (settings.data_dir / "mine.npz").write_bytes(b"out of the folder")
    before = read_state(engine, settings)
    answer = client.post("/jobs", json={"option": "b", "dataset": name})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["dataset"]
    assert read_state(engine, settings) == before


LABELS = json.dumps({f"k{i}": "v" for i in range(17)}).encode()
NESTED = [b"[" * 30_000, b'{"metadata":' * 5_000 + b"1" + b"}" * 5_000, b'{"a":[' * 9_000]
BODIES: list[tuple[bytes, set[int]]] = [
    (b'{"option": "b", "name": "' + b"x" * MAX_BODY_BYTES + b'"}', {413}),
    (b" " * (MAX_BODY_BYTES + 1), {413}),
    *((nested, {400}) for nested in NESTED),
    (b'{"option": "b", "seed": ' + b"9" * 50_000 + b"}", {400}),
    (b'{"option": "b", "learning_rate": 1e' + b"9" * 400 + b"}", {422}),
    (b'{"option": "b", "metadata": ' + LABELS + b"}", {422}),
    (b'{"option": "b", "name": "' + b"x" * 201 + b'"}', {422}),
    (b'{"option": "b", "name": "a\\u0000b"}', {422}),
    (b'{"option": "b", "name": "\\ud800"}', {422}),
    (b'{"option": "b", "metadata": {"k": "\\ud800"}}', {422}),
    (b'{"option": "b", "metadata": {"\\udfff": "v"}}', {422}),
    (b'{"option": "b", "__class__": "x"}', {422}),
    (b'{"option": "b", "id": "0123456789ab", "status": "succeeded"}', {422}),
    (b'{"option": ["b"]}', {422}),
    (b'{"option": "b", "epochs": "5"}', {422}),
    (b'{"option": "b", "epochs": true}', {422}),
    (b'{"option": "b", "augment": 1}', {422}),
    (b'{"option": "\xff"}', {400}),
    (b'{"option": "b"}{"option": "c"}', {422}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "statuses"), BODIES, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize(
    ("method", "url"),
    [
        ("POST", "/jobs"),
        ("POST", "/jobs/{}/resume"),
        ("PATCH", "/jobs/{}"),
        ("PUT", "/options/mine"),
    ],
)
def test_hostile_body_is_refused(
    client: TestClient,
    engine: Engine,
    settings: Settings,
    method: str,
    url: str,
    body: bytes,
    statuses: set[int],
) -> None:
    job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
    before = read_state(engine, settings)
    answer = client.request(method, url.format(job_id), content=body, headers=JSON)
    assert answer.status_code in statuses, answer.text[:300]
    assert len(answer.content) < 10_000
    assert read_state(engine, settings) == before


def test_body_without_a_length_is_counted_as_it_comes(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    before = read_state(engine, settings)
    pieces = (b" " * 1024 for _ in range(100))
    assert client.post("/jobs", content=pieces, headers=JSON).status_code == 413
    assert read_state(engine, settings) == before


@pytest.mark.parametrize(
    "content_type",
    [
        *(None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"),
        *("text/plain; application/json", "application/jsonp", "application/xml", "text/json"),
        *("application/x-yaml", "application/octet-stream", "application/vnd.pickle"),
    ],
)
def test_only_json_posts_a_job(
    client: TestClient, engine: Engine, settings: Settings, content_type: str | None
) -> None:
    before = read_state(engine, settings)
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post("/jobs", content=b'{"option": "b"}', headers=headers)
    assert "Content-Type: application/json" in problem(answer, 415)["detail"]
    assert read_state(engine, settings) == before


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_packed_body_is_not_unpacked(
    client: TestClient, engine: Engine, settings: Settings, coding: str
) -> None:
    before = read_state(engine, settings)
    headers = JSON | {"Content-Encoding": coding}
    answer = client.post("/jobs", content=b"\x1f\x8b" + bytes(100), headers=headers)
    assert f"Content-Encoding: {coding}" in problem(answer, 415)["detail"]
    assert read_state(engine, settings) == before


@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"])
def test_no_header_turns_a_request_into_another(
    client: TestClient, engine: Engine, settings: Settings, header: str
) -> None:
    job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    before = read_state(engine, settings)
    assert client.get(f"/jobs/{job_id}", headers={header: "DELETE"}).status_code == 200
    assert client.get(f"/jobs/{job_id}?_method=DELETE").status_code == 200
    assert read_state(engine, settings) == before


@pytest.mark.parametrize(
    "query",
    [
        *("limit=-1", "limit=1e9", "limit=99999999999999999999", "after='%20OR%201=1--"),
        *("after=%00", "status=queued'--", "name=%00", "metadata[a]=%00", "metadata[%00]=a"),
        *(
            "metadata[]=a",
            "metadata=a",
            "metadata[a=b",
            "option=a%00",
            "&".join(["status=x"] * 999),
        ),
        "&".join(f"metadata[k{i}]=v" for i in range(17)),
    ],
    ids=lambda query: query[:30],
)
def test_hostile_query_is_refused(client: TestClient, query: str) -> None:
    client.post("/jobs", json={"option": "b"})
    answer = client.get(f"/jobs?{query}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("text", ["' OR 1=1 --", "%", "_", "*", "\\", '"; DROP TABLE job; --'])
def test_filters_are_compared_and_never_run(
    client: TestClient, engine: Engine, settings: Settings, text: str
) -> None:
    client.post("/jobs", json={"option": "b", "name": "mine", "metadata": {"k": "v"}})
    before = read_state(engine, settings)
    for params in ({"name": text}, {"metadata[k]": text}):
        assert client.get("/jobs", params=params).json()["data"] == []
    assert read_state(engine, settings) == before


@pytest.mark.parametrize(
    "given", ["a\r\nSet-Cookie: x=1", "a\nb", "a b", "é", "x" * 65, "<script>"]
)
def test_request_id_that_could_break_a_line_is_replaced(
    client: TestClient, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    headers = {b"X-Request-ID": given.encode("latin-1")}
    answer = client.get("/nowhere", headers=headers)
    assert answer.headers["x-request-id"] == answer.json()["request_id"] != given
    assert given not in caplog.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", ["%0d%0aSet-Cookie:x=1", "a%0aINFO forged line", "%1b[31m"])
def test_path_breaks_neither_headers_nor_log(
    client: TestClient, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer = client.get(f"/jobs/{path}")
    assert answer.status_code == 404
    assert "set-cookie" not in answer.headers
    messages = [r.getMessage() for r in caplog.records if r.name == "losslab.access"]
    assert len(messages) == 1
    assert messages[0].isprintable()


@pytest.fixture
def post_named(
    client: TestClient, settings: Settings, engine: Engine
) -> Callable[[str], dict[str, Any]]:
    """Run a job whose name and labels are this text."""

    def post(text: str) -> dict[str, Any]:
        labels = {text[:64]: text, "k": text}
        body = {"option": "a", "name": text, "metadata": labels} | TINY | {"epochs": 1}
        job: dict[str, Any] = client.post("/jobs", json=body).raise_for_status().json()
        drain(settings, engine)
        return job

    return post


@pytest.mark.parametrize("text", XSS)
def test_names_and_labels_are_text_wherever_they_are_shown(
    client: TestClient, post_named: Callable[[str], dict[str, Any]], text: str
) -> None:
    job = post_named(text)
    shown = f"/ui/jobs/{job['id']}"
    query = f"job_id={job['id']}"
    urls = ("/", shown, f"/ui/compare?{query}", f"/comparisons/report.html?{query}")
    for url in urls:
        answer = client.get(url)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'unsafe" not in policy
        assert "<" not in text or text not in answer.text
        assert "<svg/onload" not in answer.text
        assert "<img src=x" not in answer.text
    for url in (f"/jobs/{job['id']}", "/jobs", f"/comparisons?{query}"):
        answer = client.get(url)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not CONTROLS & set(answer.text)
        assert text in list_texts(answer.json())
    events = client.get(f"/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"})
    assert not CONTROLS & set(events.text)
    markdown = client.get(f"/comparisons/report.md?{query}")
    assert markdown.headers["content-type"] == "text/plain; charset=utf-8"
    assert "<" not in markdown.text
    assert client.get(f"/comparisons/curves.png?{query}").status_code == 200


def list_texts(value: Any) -> list[str]:
    match value:
        case dict():
            return [text for item in value.values() for text in list_texts(item)]
        case list():
            return [text for item in value for text in list_texts(item)]
        case _:
            return [value] if isinstance(value, str) else []


@given(st.text(max_size=20), st.data())
def test_json_in_pieces_is_the_same_value_without_controls(text: str, data: st.DataObject) -> None:
    content = json.dumps(text + "\x9b\u2028é🦖", ensure_ascii=False).encode()
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=6).map(sorted))
    pieces = [content[a:b] for a, b in pairwise([0, *cuts, len(content)])]

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = StreamingResponse(iter(pieces), media_type="application/json")
        await response(scope, receive, send)

    got = TestClient(InertJson(answer)).get("/")
    assert got.json() == json.loads(content)
    assert not CONTROLS & set(got.text)


@pytest.mark.parametrize("text", XSS)
def test_what_a_problem_repeats_is_no_page(client: TestClient, text: str) -> None:
    for answer in (
        client.get("/jobs", params={"after": text}),
        client.get("/comparisons", params={"options": text}),
        client.post("/jobs", json={"option": text}),
        client.get("/ui/compare", params={"job_id": text}),
    ):
        assert answer.status_code in (404, 422)
        if answer.headers["content-type"].startswith("text/html"):
            assert html.escape(text) == text or text not in answer.text
        else:
            assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["x-content-type-options"] == "nosniff"
