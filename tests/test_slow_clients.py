"""Slow clients and malformed HTTP, against a real server."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest
from npz_files import GRIDS, make_npz
from service import Service

from server.api.connection_limits import MAX_WAITING_PER_ADDRESS
from server.api.connections import MAX_SMALL_CHUNKS
from server.api.limits import MAX_HEADER_BYTES

REQUEST_SECONDS, HEADER_SECONDS, SEND_SECONDS = 1.0, 2.0, 2.0
#: For a machine that is busy with other tests.
PATIENCE_SECONDS = 60.0
NUM_UNREAD = 50
#: Gives what came of one of SLOW_ONES.
Outcome = Callable[[Callable[..., Any]], Any]
HEAD = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("slow")
    service = Service(directory / "experiments", log_path=directory / "server.log")
    service.environment = {
        "LOSSLAB_REQUEST_SECONDS": str(REQUEST_SECONDS),
        "LOSSLAB_HEADER_SECONDS": str(HEADER_SECONDS),
        "LOSSLAB_SEND_SECONDS": str(SEND_SECONDS),
    }
    service.start("server")
    yield service
    service.stop("server")


@pytest.fixture(autouse=True)
def unharmed(service: Service) -> Iterator[None]:
    """Whatever happened, no job was posted and others are answered at once."""
    before = httpx.get(f"{service.url}/jobs").json()
    yield
    assert httpx.get(f"{service.url}/jobs").json() == before


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_SECONDS)


def read_all(connection: socket.socket) -> bytes:
    """The server's bytes until it closes or resets the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def exchange(service: Service, request: bytes) -> bytes:
    """The server's answer to these bytes, until the connection ends."""
    with closing(connect(service)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        return read_all(connection)


def read_status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def say_nothing(service: Service) -> bytes:
    with closing(connect(service)) as connection:
        return read_all(connection)


def say_nothing_hundreds_of_times(service: Service) -> set[bytes]:
    silent = [connect(service) for _ in range(MAX_WAITING_PER_ADDRESS // 2)]
    try:
        with ThreadPoolExecutor(10) as pool:
            return set(pool.map(read_all, silent))
    finally:
        for connection in silent:
            connection.close()


def trickle_headers(service: Service) -> float:
    """The seconds until the server closed the connection."""
    started = time.monotonic()
    with closing(connect(service)) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n")
        while time.monotonic() - started < PATIENCE_SECONDS:
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.3)
    return time.monotonic() - started


def trickle_a_second_request(service: Service) -> bytes:
    with closing(connect(service)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_status(connection.recv(65536)) == 200
        connection.sendall(b"GET /jobs HT")
        return read_all(connection)


def stop_in_an_upload(service: Service) -> tuple[int, float]:
    """The status and the seconds until it came."""
    started = time.monotonic()
    head = f"PUT /datasets/mine HTTP/1.1\r\n{HEAD}Content-Length: 100000\r\n\r\n"
    status = read_status(exchange(service, head.encode() + bytes(1000)))
    return status, time.monotonic() - started


def leave_answers_unread(service: Service) -> bytes:
    """What is left to be read of many answers after much more time than there is to read them."""
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(("127.0.0.1", service.port))
        request = f"GET /openapi.json HTTP/1.1\r\n{HEAD}\r\n".replace("close", "keep-alive")
        connection.sendall(NUM_UNREAD * request.encode())
        time.sleep(3 * SEND_SECONDS)
        return read_all(connection)


SLOW_ONES = (
    leave_answers_unread,
    say_nothing,
    say_nothing_hundreds_of_times,
    trickle_headers,
    trickle_a_second_request,
    stop_in_an_upload,
)


@pytest.fixture(scope="module")
def outcome(service: Service) -> Iterator[Outcome]:
    """What comes of each of these; they come all at once, since each takes seconds."""
    with ThreadPoolExecutor(len(SLOW_ONES)) as pool:
        futures = {slow: pool.submit(slow, service) for slow in SLOW_ONES}
        yield lambda slow: futures[slow].result()


def test_silent_connection_is_closed(outcome: Outcome) -> None:
    assert outcome(say_nothing) == b""


def test_hundreds_of_silent_connections_end_by_themselves(outcome: Outcome) -> None:
    assert outcome(say_nothing_hundreds_of_times) == {b""}


def test_connection_with_slow_headers_is_closed(outcome: Outcome) -> None:
    assert outcome(trickle_headers) < PATIENCE_SECONDS


def test_connection_with_a_slow_second_request_is_closed(outcome: Outcome) -> None:
    assert outcome(trickle_a_second_request).count(b"HTTP/1.1 200") == 0


@pytest.mark.parametrize("method", ["POST /jobs", "POST /ui/jobs", "PATCH /jobs/000000000000"])
def test_body_that_stops_is_answered_408(service: Service, method: str) -> None:
    head = HEAD + "Sec-Fetch-Site: same-origin\r\nContent-Length: 100\r\n"
    with closing(connect(service)) as connection:
        connection.sendall(f"{method} HTTP/1.1\r\n{head}\r\n{{".encode())
        answer = read_all(connection)
    assert read_status(answer) == 408
    assert b"connection: close" in answer.lower()


def test_answers_that_are_not_read_are_neither_computed_nor_kept(
    service: Service, outcome: Outcome
) -> None:
    length = len(httpx.get(f"{service.url}/openapi.json").content)
    assert len(outcome(leave_answers_unread)) < NUM_UNREAD * length / 4
    assert service.log_path is not None
    log = service.log_path.read_text(encoding="utf-8")
    assert 1 <= log.count("GET /openapi.json 200") < NUM_UNREAD / 4


def ask_often(service: Service) -> float:
    """The seconds that twenty requests take."""
    started = time.monotonic()
    for _ in range(20):
        answer = httpx.get(f"{service.url}/jobs", timeout=PATIENCE_SECONDS)
        assert answer.status_code == 200
    return time.monotonic() - started


def test_slow_ones_do_not_keep_others_waiting(service: Service) -> None:
    head = f"POST /jobs HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n{{".encode()
    alone_seconds = ask_often(service)
    slow = [connect(service) for _ in range(200)]
    try:
        for index, connection in enumerate(slow):
            connection.sendall(head if index % 2 else head[:40])
        # If one waited for another's body, each request would take REQUEST_SECONDS.
        assert ask_often(service) < max(20 * REQUEST_SECONDS, 5 * alone_seconds)
    finally:
        for connection in slow:
            connection.close()


def test_endless_chunks_are_counted(service: Service) -> None:
    head = f"POST /jobs HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert read_status(exchange(service, head.encode() + 200 * chunk)) == 413


SMALL_CHUNK = b"1\r\n \r\n"
CHUNKED = f"POST /jobs HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()


def test_body_of_very_many_small_chunks_is_refused(service: Service) -> None:
    answer = exchange(service, CHUNKED + 10 * MAX_SMALL_CHUNKS * SMALL_CHUNK)
    assert read_status(answer) in (0, 400)  # not read any further, so that no answer may arrive


def test_small_chunks_of_an_answered_request_are_not_read_on(service: Service) -> None:
    head = CHUNKED.replace(b"application/json", b"text/plain").replace(b"close", b"keep-alive")
    with closing(connect(service)) as connection:
        connection.sendall(head)
        assert read_status(connection.recv(65536)) == 415
        with contextlib.suppress(ConnectionError):
            connection.sendall(10 * MAX_SMALL_CHUNKS * SMALL_CHUNK)
            connection.sendall(f"0\r\n\r\nGET /healthz HTTP/1.1\r\n{HEAD}\r\n".encode())
        assert b"HTTP/1.1 200" not in read_all(connection)


def test_body_may_come_in_some_small_chunks_or_in_many_larger_ones(service: Service) -> None:
    end = b"0\r\n\r\n"
    some = exchange(service, CHUNKED + MAX_SMALL_CHUNKS * SMALL_CHUNK + end)
    larger = exchange(service, CHUNKED + 500 * (b"80\r\n" + 128 * b" " + b"\r\n") + end)
    assert [read_status(answer) for answer in (some, larger)] == [422, 422]


@pytest.mark.parametrize(
    "lines",
    [
        "X-A: " + "a" * MAX_HEADER_BYTES,
        "\r\n".join(f"X-{i}: a" for i in range(3000)),
        "Cookie: " + "losslab_token=a; " * 2000,
        "Authorization: Bearer " + "a" * 2 * MAX_HEADER_BYTES,
    ],
    ids=["long", "many", "cookies", "token"],
)
def test_oversized_headers_are_refused(service: Service, lines: str) -> None:
    request = f"GET /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n\r\n"
    assert read_status(exchange(service, request.encode())) in (400, 431)


def test_oversized_address_is_refused(service: Service) -> None:
    request = f"GET /jobs?name={'a' * 2 * MAX_HEADER_BYTES} HTTP/1.1\r\n{HEAD}\r\n"
    assert read_status(exchange(service, request.encode())) in (400, 431)


BODY = b'{"option": "b"}'
LENGTH = f"Content-Length: {len(BODY)}\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        # Each of these means one thing to a proxy in front and might mean another one here.
        f"POST /jobs HTTP/1.1\r\n{HEAD}{LENGTH}Content-Length: 3\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}Content-Length: +15\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}Content-Length: 15, 15x\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}Content-Length: -1\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}Transfer-Encoding: xchunked\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}{LENGTH}X-A: b\rX-B: c\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}{LENGTH}X-A\x00: b\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\n{HEAD}Content-Length : 15\r\n\r\n",
        f"POST /jobs HTTP/1.1\r\nHost: localhost\r\n{HEAD}{LENGTH}\r\n",
        f"POST /jobs HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n{LENGTH}\r\n",
        f"POST /jobs HTTP/1.1\r\nConnection: close\r\n{LENGTH}\r\n",
        f"POST\t/jobs HTTP/1.1\r\n{HEAD}{LENGTH}\r\n",
        f"POST /jobs\r\nX: y HTTP/1.1\r\n{HEAD}{LENGTH}\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_ambiguous_request_posts_nothing(service: Service, request_: str) -> None:
    answer = exchange(service, request_.encode("latin-1") + BODY)
    assert read_status(answer) in (0, 400, 408, 421, 422)


@pytest.mark.parametrize(
    "target",
    [
        *("/../../../etc/passwd", "/static/../../etc/passwd", "/jobs/../../etc/passwd"),
        *(
            "//etc/passwd",
            "/..;/etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/jobs/..%2f..%2fjob.log",
        ),
        *("/datasets/..\\..\\losslab.db", "http://evil.example/jobs/x", "*", "/jobs/x#/../.."),
    ],
)
def test_raw_path_leads_nowhere(service: Service, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(service, request.encode())
    assert read_status(answer) in (400, 404)
    assert b"root:" not in answer


def test_upload_that_stops_is_answered_408_and_leaves_nothing(
    service: Service, outcome: Outcome
) -> None:
    status, seconds = outcome(stop_in_an_upload)
    assert status == 408
    # An upload may take ten times as long as another request.
    assert seconds >= 5 * REQUEST_SECONDS
    assert list(service.data_dir.rglob(".*.part")) == []
    assert httpx.get(f"{service.url}/datasets/mine").status_code == 404


def test_upload_that_breaks_off_leaves_nothing(service: Service, outcome: Outcome) -> None:
    outcome(stop_in_an_upload)  # which has a file meanwhile
    content = make_npz(images=GRIDS)
    head = f"PUT /datasets/mine HTTP/1.1\r\n{HEAD}Content-Length: {len(content)}\r\n\r\n"
    for length in (0, 1, len(content) // 2, len(content) - 1):
        with closing(connect(service)) as connection:
            connection.sendall(head.encode() + content[:length])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while list(service.data_dir.rglob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(service.data_dir.rglob(".*.part"))
    assert httpx.get(f"{service.url}/datasets/mine").status_code == 404


def test_log_shows_no_traceback(service: Service) -> None:
    assert service.log_path is not None
    assert "Traceback" not in service.log_path.read_text(encoding="utf-8")
    assert os.path.getsize(service.log_path) < 10_000_000
