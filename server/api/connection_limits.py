"""Limits of connections: how many there may be, and how much of their answers may be unread."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Final, Protocol

from server.environment.hosts import find_network

#: Of all clients together.
MAX_CONNECTIONS: Final = 1000
#: Of one address that are not being answered: silent ones, and those whose request still comes.
MAX_WAITING_PER_ADDRESS: Final = 250
#: So many connections of a network are no sign of an attack: a browser opens them.
_FEW: Final = 6
#: Of answers that their clients do not read, of all together.
MAX_UNREAD_BYTES: Final = 64 * 1024 * 1024

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
