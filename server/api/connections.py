"""Connections: how they are read, how long they may say nothing, and what ends them."""

import asyncio
import resource
import socket
from functools import partial
from typing import ClassVar, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.connection_limits import MAX_CONNECTIONS, ConnectionLimit, UnreadAnswers
from server.api.limits import MAX_HEADER_BYTES
from server.environment.hosts import is_within
from server.settings import Settings

#: What is read of a connection before others have their turn.
_READ_BYTES: Final = 64 * 1024
#: Of one request, if they are smaller than the next limit on average.
MAX_SMALL_CHUNKS: Final = 1000
_SMALL_CHUNK_BYTES: Final = 64
#: So much of an answer must be read in a time limit.
_MIN_READ_BYTES: Final = 1024
#: Above it nothing is added to an answer that its client does not read.
_WAITING_BYTES: Final = 16 * 1024
#: What the system keeps of an answer in addition, beyond what is on its way.
_UNSENT_BYTES: Final = 64 * 1024
#: Of what a process may open, the rest is for files and the database.
_SHARE_OF_FILES: Final = 3 / 4


class _ReadersFlow(FlowControl):
    """Reads nothing from a client that does not read either."""

    def resume_reading(self) -> None:
        if not self.write_paused:
            super().resume_reading()


class _BoundedParser(h11.Connection):
    """h11's parser; a body of very many very small chunks is a fault for it.

    Each chunk takes as long to parse as some kilobytes in one piece.
    """

    _num_chunks = _num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            self._check_chunks()
        return event

    def _check_chunks(self) -> None:
        is_small = self._num_bytes < self._num_chunks * _SMALL_CHUNK_BYTES
        if is_small and self._num_chunks > MAX_SMALL_CHUNKS:
            raise h11.RemoteProtocolError("too many small chunks")


class HttpProtocol(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's protocol; it also closes a connection whose headers do not arrive in time, or that
    is one too many or does not read, and reads little at a time.

    Nothing is read and no further request is begun while an answer is unread, so that a connection
    keeps one answer at most.
    """

    header_seconds: ClassVar[float]
    send_seconds: ClassVar[float]
    connection_limit: ClassVar[ConnectionLimit]
    unread_answers: ClassVar[UnreadAnswers]
    #: One for all connections: what is in it is copied before another one reads.
    _buffer: ClassVar[memoryview] = memoryview(bytearray(_READ_BYTES))
    _header_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _is_completion_due = False

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        return not self.has_request or self.cycle.more_body or self.flow.write_paused

    @property
    def num_unread_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def close(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = _BoundedParser(h11.SERVER, MAX_HEADER_BYTES)
        self.flow = _ReadersFlow(transport)
        transport.set_write_buffer_limits(high=_WAITING_BYTES)
        _bound_unsent(transport)
        self._start_header_timer()
        self.connection_limit.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        self.connection_limit.mark_used(self)
        super().data_received(data)
        is_between_requests = self.cycle is None or self.cycle.response_complete
        if not is_between_requests:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._start_header_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is no HTTP; its body may turn out to be none after the answer."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection_limit.remove(self)
        self.unread_answers.remove(self)
        self._stop_header_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()
        self._start_unread_timer()
        self.unread_answers.add(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread_timer()
        self.unread_answers.remove(self)
        self.flow.resume_reading()
        if self._is_completion_due:
            self._is_completion_due = False
            super().on_response_complete()

    def on_response_complete(self) -> None:
        if self.flow.write_paused:
            self._is_completion_due = True
        else:
            super().on_response_complete()

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._close_on_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_on_timeout(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _start_unread_timer(self) -> None:
        num_bytes = self.num_unread_bytes
        self._unread_timer = self.loop.call_later(self.send_seconds, self._check_reading, num_bytes)

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _check_reading(self, num_bytes: int) -> None:
        """Close the connection if hardly any of the bytes have been read meanwhile."""
        if self.num_unread_bytes > num_bytes - _MIN_READ_BYTES:
            self.close()
        else:
            self._start_unread_timer()


def _bound_unsent(transport: asyncio.Transport) -> None:
    """Let the system keep little of what a client does not read, where it can."""
    # The option's name is missing where there is no such option.
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    connection = transport.get_extra_info("socket")
    if option is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, option, _UNSENT_BYTES)


def make_config(app: ASGIApp, settings: Settings, *, log_level: str) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        log_config=None,  # keep the logging of the process
        log_level=log_level,
        access_log=False,  # our own log line has more details
        http=_make_protocol(settings),
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def _make_protocol(settings: Settings) -> type[HttpProtocol]:
    """The protocol with its limits; uvicorn makes its instances itself."""
    is_proxy = partial(is_within, networks=settings.trusted_proxies)
    limit = ConnectionLimit(max_total=_allow_connections(), is_proxy=is_proxy)
    own = {
        "header_seconds": settings.header_seconds,
        "send_seconds": settings.send_seconds,
        "connection_limit": limit,
        "unread_answers": UnreadAnswers(),
    }
    return type("LimitedHttpProtocol", (HttpProtocol,), own)


def _allow_connections() -> int:
    """Let this process open as many files as it may; returns how many connections it can have."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = int(MAX_CONNECTIONS / _SHARE_OF_FILES) + 1
    if allowed < wanted:
        allowed = min(wanted, most) if most != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    return min(MAX_CONNECTIONS, int(allowed * _SHARE_OF_FILES))
