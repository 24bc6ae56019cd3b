"""Many connections: who keeps theirs when there are too many."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from service import Service

from server.api.connection_limits import (
    MAX_CONNECTIONS,
    MAX_WAITING_PER_ADDRESS,
    ConnectionLimit,
    UnreadAnswers,
)

#: The honest user is at 127.0.0.1.
ATTACKERS = [f"127.0.0.{number}" for number in range(2, 8)]


@dataclass(eq=False)
class Line:
    """A connection without a network."""

    address: str
    waits_for_client: bool = True
    has_request: bool = False
    num_unread_bytes: int = 0
    is_closed: bool = field(default=False, init=False)

    def close(self) -> None:
        self.is_closed = True


def make_limit(**limits: int) -> ConnectionLimit:
    return ConnectionLimit(is_proxy=lambda address: address == "proxy", **limits)


def open_lines(limit: ConnectionLimit, address: str, *, num: int, waits: bool = True) -> list[Line]:
    lines = [Line(address, waits) for _ in range(num)]
    for line in lines:
        limit.add(line)
    return lines


def test_whoever_has_most_connections_loses_the_oldest() -> None:
    limit = make_limit(max_total=10)
    attack = open_lines(limit, "evil", num=8)
    honest = open_lines(limit, "good", num=4)
    assert [line.is_closed for line in attack] == [True, True] + 6 * [False]
    assert not any(line.is_closed for line in honest)


def test_connection_that_was_just_used_is_the_last_to_go() -> None:
    limit = make_limit(max_total=3)
    used, unused, _ = open_lines(limit, "evil", num=3)
    limit.mark_used(used)
    open_lines(limit, "good", num=1)
    assert (used.is_closed, unused.is_closed) == (False, True)


def test_connection_that_is_answered_is_never_closed() -> None:
    limit = make_limit(max_total=3)
    busy = open_lines(limit, "evil", num=3, waits=False)
    (late,) = open_lines(limit, "good", num=1)
    assert not any(line.is_closed for line in busy)
    assert late.is_closed  # none of the others waits for its client


def test_one_address_may_not_let_more_than_its_share_wait() -> None:
    limit = make_limit(max_total=100, max_waiting=2)
    silent = open_lines(limit, "evil", num=4)
    busy = open_lines(limit, "good", num=4, waits=False)
    behind_proxy = open_lines(limit, "proxy", num=4)
    assert [line.is_closed for line in silent] == [True, True, False, False]
    assert not any(line.is_closed for line in [*busy, *behind_proxy])


def test_closed_connections_make_room() -> None:
    limit = make_limit(max_total=2)
    first, second = open_lines(limit, "a", num=2)
    limit.remove(first)
    limit.remove(first)  # as a connection does that was closed for its time
    (third,) = open_lines(limit, "b", num=1)
    assert not second.is_closed
    assert not third.is_closed


def test_many_networks_with_one_silent_connection_each_do_not_close_an_upload() -> None:
    limit = make_limit(max_total=10)
    upload, idle = Line("good", has_request=True), Line("good")
    limit.add(upload)
    limit.add(idle)
    evil = [Line(f"evil {number}") for number in range(30)]
    for line in evil:
        limit.add(line)
    assert not upload.is_closed
    assert not evil[-1].is_closed


def test_new_connection_is_not_closed_for_uploads_that_wait() -> None:
    limit = make_limit(max_total=10)
    for number in range(10):
        limit.add(Line(f"evil {number}", has_request=True))
    (late,) = open_lines(limit, "good", num=1)
    assert not late.is_closed


def test_addresses_of_one_network_count_together() -> None:
    limit = make_limit(max_total=10)
    honest = open_lines(limit, "good", num=2)
    for number in range(20):
        limit.add(Line(f"2001:db8::{number}"))
    assert not any(line.is_closed for line in honest)


def test_network_that_leaves_most_unread_loses_its_oldest_answer() -> None:
    answers = UnreadAnswers(max_bytes=10)
    good, *evil = (
        Line("good", num_unread_bytes=4),
        Line("2001:db8::1", num_unread_bytes=3),
        Line("2001:db8::2", num_unread_bytes=3),
        Line("2001:db8::3", num_unread_bytes=3),
    )
    for line in (good, *evil):
        answers.add(line)
    assert [line.is_closed for line in (good, *evil)] == [False, True, False, False]


def test_answer_that_is_read_makes_room_for_others() -> None:
    answers = UnreadAnswers(max_bytes=10)
    lines = [Line("a", num_unread_bytes=8) for _ in range(3)]
    for line in lines:
        answers.add(line)
        answers.remove(line)
    assert not any(line.is_closed for line in lines)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("crowd")
    service = Service(folder / "experiments", log_path=folder / "server.log")
    service.environment = {"LOSSLAB_HEADER_SECONDS": "60"}
    service.start("server")
    yield service
    service.stop("server")


def say_nothing(_connection: socket.socket) -> None:
    pass


def begin_a_head(connection: socket.socket) -> None:
    connection.sendall(b"GET /jobs HTTP/1.1\r\nHost: local")


def begin_a_body(connection: socket.socket) -> None:
    connection.sendall(
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\n\r\n{"
    )


@pytest.mark.parametrize("begin", [say_nothing, begin_a_head, begin_a_body])
def test_honest_requests_are_answered_beside_connections_that_do_not_go_on(
    service: Service, begin: Callable[[socket.socket], None]
) -> None:
    num_each = MAX_CONNECTIONS // len(ATTACKERS) + 10
    assert num_each < MAX_WAITING_PER_ADDRESS
    with ExitStack() as stack:
        for number in range(num_each * len(ATTACKERS)):
            source = (ATTACKERS[number % len(ATTACKERS)], 0)
            address = ("127.0.0.1", service.port)
            connection = socket.create_connection(address, timeout=60, source_address=source)
            stack.callback(connection.close)
            with contextlib.suppress(ConnectionError):
                begin(connection)
        answers = [httpx.get(f"{service.url}/jobs", timeout=60).status_code for _ in range(5)]
    assert answers == 5 * [200]


def test_silent_connections_of_one_address_are_closed_beyond_its_share(service: Service) -> None:
    address = ("127.0.0.1", service.port)
    with ExitStack() as stack:
        lines = []
        for _ in range(MAX_WAITING_PER_ADDRESS + 20):
            source = (ATTACKERS[0], 0)
            line = socket.create_connection(address, timeout=60, source_address=source)
            stack.callback(line.close)
            lines.append(line)
        # They are closed in the order in which they came.
        for line in lines[:20]:
            with contextlib.suppress(ConnectionResetError):
                assert line.recv(1) == b""
        lines[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 200 " in lines[-1].recv(100)


def test_warning_tells_who_opened_too_many_once(service: Service) -> None:
    assert service.log_path is not None
    log = Path(service.log_path).read_text()
    assert log.count("connections are open") == 1
