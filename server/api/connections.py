"""Connections: how many there may be, how long they may say nothing, and what they leave unread."""

import asyncio
import logging
import resource
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import ClassVar, Final, Protocol

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.limits import MAX_HEADER_BYTES
from server.environment.hosts import find_network, is_within
from server.settings import Settings

#: Of all clients together.
MAX_CONNECTIONS: Final = 1000
#: Of one address that are not being answered: silent ones, and those whose request still comes.
MAX_WAITING_PER_ADDRESS: Final = 250
#: What is read of a connection before others have their turn.
_READ_BYTES: Final = 64 * 1024
#: Of one request, if they are smaller than the next limit on average.
MAX_SMALL_CHUNKS: Final = 1000
_SMALL_CHUNK_BYTES: Final = 64
#: Of answers that their clients do not read, of all together.
MAX_UNREAD_BYTES: Final = 64 * 1024 * 1024
#: So much of an answer must be read in a time limit.
_MIN_READ_BYTES: Final = 1024
#: Above it nothing is added to an answer that its client does not read.
_WAITING_BYTES: Final = 16 * 1024
#: What the system keeps of an answer in addition, beyond what is on its way.
_UNSENT_BYTES: Final = 64 * 1024
#: So many connections of a network are no sign of an attack: a browser opens them.
_FEW: Final = 6
#: Of what a process may open, the rest is for files and the database.
_SHARE_OF_FILES: Final = 3 / 4

_logger = logging.getLogger(__name__)


class Connection(Protocol):
    """What is looked at of a connection."""

    @property
    def address(self) -> str:
        """Of the client, or of the proxy."""

    @property
    def waits_for_client(self) -> bool:
        """Whether the client has to send or to read something before anything goes on."""

    @property
    def has_request(self) -> bool:
        """Whether a request is under way."""

    @property
    def num_unread_bytes(self) -> int:
        """What waits to be sent until the client reads."""

    def close(self) -> None:
        """Close it without an answer."""


class ConnectionLimit:
    """The open connections of a server, of which there may be `max_total`.

    If there are too many, the network that has most of them loses the connection that has waited
    longest for its client: whoever opens many closes their own. Networks with a few are all alike.
    One without a request goes before one whose request still comes, such as an upload, and the
    newest goes last. One that is answered is never closed. A network may have `max_waiting` that
    wait, unless it is that of a proxy, behind which there are many clients.
    """

    def __init__(
        self,
        *,
        max_total: int = MAX_CONNECTIONS,
        max_waiting: int = MAX_WAITING_PER_ADDRESS,
        is_proxy: Callable[[str], bool],
    ) -> None:
        self._max_total = max_total
        self._max_waiting = max_waiting
        self._is_proxy = is_proxy
        self._by_network: dict[str, OrderedDict[Connection, None]] = {}
        self._by_use: OrderedDict[Connection, None] = OrderedDict()
        self._has_warned = False

    def add(self, connection: Connection) -> None:
        """Note a new connection, and close one if there are too many now."""
        own = self._by_network.setdefault(find_network(connection.address), OrderedDict())
        own[connection] = self._by_use[connection] = None
        if len(self._by_use) > self._max_total:
            self._warn(connection.address)
            self._close_one([*self._list_large_ones(), self._by_use], newest=connection)
        elif self._waits_too_often(own) and not self._is_proxy(connection.address):
            self._close_one([own], newest=connection)

    def mark_used(self, connection: Connection) -> None:
        """Note that the client has just sent something."""
        if connection in self._by_use:
            self._by_use.move_to_end(connection)
            self._by_network[find_network(connection.address)].move_to_end(connection)

    def remove(self, connection: Connection) -> None:
        """Note that it is closed; one that is closed already is no fault."""
        if connection not in self._by_use:
            return
        del self._by_use[connection]
        network = find_network(connection.address)
        del self._by_network[network][connection]
        if not self._by_network[network]:
            del self._by_network[network]

    def _waits_too_often(self, own: Collection[Connection]) -> bool:
        # Most addresses have few, and are not counted.
        limit = self._max_waiting
        return len(own) > limit and sum(each.waits_for_client for each in own) > limit

    def _list_large_ones(self) -> list[OrderedDict[Connection, None]]:
        """The networks with more than a few, from the largest."""
        large = [own for own in self._by_network.values() if len(own) > _FEW]
        return sorted(large, key=len, reverse=True)

    def _close_one(self, groups: Iterable[Iterable[Connection]], *, newest: Connection) -> None:
        """Close one that waits for its client; if none does, no harm is done."""
        found = (_find_waiting(group, newest=newest) for group in groups)
        chosen = next((each for each in found if each is not None), newest)
        if chosen.waits_for_client:
            self.remove(chosen)
            chosen.close()

    def _warn(self, address: str) -> None:
        """Once: an attack would fill the log."""
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "more than %d connections are open, the newest from %s; those of the address with "
                "most of them are closed as long as they wait for their client",
                self._max_total,
                address,
            )


def _find_waiting(group: Iterable[Connection], *, newest: Connection) -> Connection | None:
    """The first one that waits for its client, if possible one without a request."""
    first = None
    for each in group:
        if each is not newest and each.waits_for_client:
            if not each.has_request:
                return each
            first = first or each
    return first


class UnreadAnswers:
    """What waits until clients read it, of which a server keeps `max_bytes`.

    If there is more, the network that has most of it loses the connection that has been unread for
    longest.
    """

    def __init__(self, *, max_bytes: int = MAX_UNREAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes: dict[Connection, int] = {}
        self._total = 0
        self._has_warned = False

    def add(self, connection: Connection) -> None:
        """Note a connection whose client does not read for now, and close some if it is too much.

        It counts with all that is unread now until all but a rest of it has been read.
        """
        self.remove(connection)
        self._num_bytes[connection] = connection.num_unread_bytes
        self._total += self._num_bytes[connection]
        while self._total > self._max_bytes:
            self._warn()
            self._close_one()

    def remove(self, connection: Connection) -> None:
        """Note that the client reads again, or has gone."""
        self._total -= self._num_bytes.pop(connection, 0)

    def _close_one(self) -> None:
        by_network: Counter[str] = Counter()
        for connection, num_bytes in self._num_bytes.items():
            by_network[find_network(connection.address)] += num_bytes
        ((largest, _),) = by_network.most_common(1)
        found = next(each for each in self._num_bytes if find_network(each.address) == largest)
        self.remove(found)
        found.close()

    def _warn(self) -> None:
        """Once: an attack would fill the log."""
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "clients leave more than %d bytes of their answers unread; connections of the "
                "address with most of them are closed",
                self._max_bytes,
            )


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
