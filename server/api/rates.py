"""How many requests a client may send in a time."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.problems import respond
from server.api.security import HEALTH_PATH
from server.environment.hosts import find_network

_UNIT_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600}
#: Above so many, the client is forgotten that has sent nothing for longest.
MAX_CLIENTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of requests in a number of seconds."""

    num_requests: int
    seconds: int
    text: str  #: as it was configured

    @classmethod
    def parse(cls, text: str) -> Self:
        """`6000/minute`, as the settings allow it."""
        number, _, unit = text.partition("/")
        return cls(int(number), seconds=_UNIT_SECONDS[unit], text=text)


@dataclass(slots=True)
class _Window:
    """What a client has sent in this stretch of time, and in the one before it."""

    index: int
    count: int = 0
    former: int = 0


class RateCounter:
    """Counts requests per client in a sliding window.

    The window is that of two counters: this stretch's, and the share of the former one's that the
    window still covers. Time is measured by a clock that is never set: by the time of day, a clock
    that is set back would lock clients out for hours.
    """

    def __init__(self, rate: Rate, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def hit(self, client: str) -> float:
        """Count a request. Returns 0 if it is allowed, else the seconds until one will be."""
        index, elapsed = divmod(self._clock(), self._rate.seconds)
        with self._lock:
            window = self._find_window(client, index=int(index))
            share = 1 - elapsed / self._rate.seconds
            if window.count + window.former * share >= self._rate.num_requests:
                return self._find_wait(window, share=share)
            window.count += 1
        return 0.0

    def _find_window(self, client: str, *, index: int) -> _Window:
        window = self._windows.get(client)
        if window is None:
            window = self._windows[client] = _Window(index)
            if len(self._windows) > MAX_CLIENTS:
                self._windows.popitem(last=False)
        elif window.index != index:
            former = window.count if window.index == index - 1 else 0
            window = self._windows[client] = _Window(index, former=former)
        self._windows.move_to_end(client)
        return window

    def _find_wait(self, window: _Window, *, share: float) -> float:
        allowed = self._rate.num_requests - window.count
        covered = max(0.0, allowed / window.former) if window.former else 0.0
        return max(0.001, (share - covered) * self._rate.seconds)


def find_client(request: Request) -> str:
    """Who asks: the token, or the address where none is needed (of IPv6, its /64).

    No token is named like an address.
    """
    if token_name := getattr(request.state, "token_name", None):
        return f"token {token_name}"
    return f"address {find_network(request.client.host) if request.client else ''}"


class RateLimit:
    """Answers 429 to too many requests per token, or per address if no token is needed."""

    def __init__(self, app: ASGIApp, *, rate: Rate) -> None:
        self._app = app
        self._rate = rate
        self._counter = RateCounter(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        wait_seconds = self._counter.hit(find_client(request))
        if not wait_seconds:
            await self._app(scope, receive, send)
            return
        headers = {"Retry-After": str(max(1, math.ceil(wait_seconds)))}
        detail = f"more than {self._rate.text} (LOSSLAB_RATE_LIMIT); try again later"
        await respond(request, 429, detail, headers=headers)(scope, receive, send)
