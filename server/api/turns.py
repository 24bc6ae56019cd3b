"""Turns for what only a few requests may have at a time, given fairly between clients.

Pictures, reports and comparisons take the processor for seconds. Without a bound they would hold
all sessions of the database, and everybody would wait. So a request takes a turn before it takes a
session, for which there are turns too. The turns go round the clients that wait. Whoever would wait
behind too many others, or has waited too long, is told to come back.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute

from server.api.addresses import locate
from server.api.rates import find_client
from server.errors import UnavailableError
from server.settings import Settings

#: Fewer than the pool's connections (15): a request that writes needs one more.
NUM_SESSIONS: Final = 8
#: Fewer than the sessions, so that requests that are answered at once always find one.
NUM_TURNS: Final = 2
#: Requests that wait for each turn that there is. Each also keeps one of the server's connections.
_MAX_WAITING: Final = 64
_MAX_WAITING_OF_CLIENT: Final = 16
#: The share of the time for an answer that a request may wait for its turn.
_WAIT_SHARE: Final = 0.5

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Turns:
    """A bounded number of turns, given to waiting clients by rotation.

    Raises UnavailableError in a request that got none in time, or that finds too many waiting.
    """

    def __init__(self, num_turns: int, *, purpose: str, wait_seconds: float) -> None:
        self._num_turns = self.num_free = num_turns
        self._purpose = purpose
        self._wait_seconds = wait_seconds
        #: Requests that wait by client; the client whose turn is next stands first.
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        self._shared: dict[tuple[str, str], asyncio.Future[Response]] = {}
        self._num_waiting: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, client: str) -> AsyncIterator[None]:
        """A turn while the context is entered."""
        await self._take(client)
        try:
            yield
        finally:
            self._give_back()

    async def answer_together(
        self, client: str, request: str, *, work: Callable[[], Awaitable[Response]]
    ) -> Response:
        """The answer of `work` in a turn. Equal requests of a client that wait get the same one.

        A request that comes after the work began is not among them: it sees what has changed. A
        streamed answer is not shared.
        """
        key = client, request
        while shared := self._shared.get(key):
            with self._waiting(client):
                await asyncio.wait([shared])
            if not shared.cancelled():
                return _copy(shared.result())
        answer = self._shared[key] = asyncio.get_running_loop().create_future()
        try:
            async with self.hold(client):
                del self._shared[key]
                response = await work()
            if not isinstance(response, StreamingResponse):
                answer.set_result(response)
        finally:
            # Without an answer, another of the requests takes its place and tries for itself.
            if not answer.done():
                answer.cancel()
            if self._shared.get(key) is answer:
                del self._shared[key]
        return response

    async def _take(self, client: str) -> None:
        if self.num_free:
            self.num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        with self._waiting(client):
            self._lines.setdefault(client, deque()).append(turn)
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await turn
            except BaseException as error:
                self._leave(client, turn)
                if isinstance(error, TimeoutError):
                    raise UnavailableError(
                        f"{self._describe()}, and no turn came in {self._wait_seconds:g} s; try "
                        "again later"
                    ) from None
                raise

    def _leave(self, client: str, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():  # granted at the same moment
            self._give_back()
        elif turn in (line := self._lines.get(client, deque())):
            line.remove(turn)
            if not line:
                del self._lines[client]

    @contextmanager
    def _waiting(self, client: str) -> Iterator[None]:
        """Count a request that waits. Raises UnavailableError if too many do."""
        limit = _MAX_WAITING_OF_CLIENT * self._num_turns
        if self._num_waiting[client] >= limit:
            raise UnavailableError(
                f"{self._describe()}, and {limit} of your requests wait already; try again later"
            )
        if self._num_waiting.total() >= _MAX_WAITING * self._num_turns:
            raise UnavailableError(f"{self._describe()}, and too many wait; try again later")
        self._num_waiting[client] += 1
        try:
            yield
        finally:
            self._num_waiting[client] -= 1
            if not self._num_waiting[client]:
                del self._num_waiting[client]

    def _describe(self) -> str:
        return f"others {self._purpose} ({self._num_turns} at a time)"

    def _give_back(self) -> None:
        """Give the turn to the next request that still waits."""
        while self._lines:
            client = next(iter(self._lines))
            line = self._lines.pop(client)
            while line:
                turn = line.popleft()
                if turn.done():
                    continue
                if line:
                    self._lines[client] = line  # behind all other clients
                turn.set_result(None)
                return
        self.num_free += 1


class TurnRoute(APIRoute):
    """A route whose answers take seconds to compute."""

    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()

        async def handle_in_turn(request: Request) -> Response:
            if not request.url.query and not request.path_params:
                return await handle(request)  # it names nothing to compute
            turns: Turns = request.app.state.turns
            refresh = request.headers.get("Losslab-Refresh", "")
            path = locate(request.url.path)
            address = f"{refresh} {request.method} {path}?{request.url.query}"
            return await turns.answer_together(
                find_client(request), address, work=lambda: handle(request)
            )

        return handle_in_turn


async def _take_turn(request: Request) -> AsyncIterator[None]:
    if not request.url.query:
        yield
        return
    turns: Turns = request.app.state.turns
    async with turns.hold(find_client(request)):
        yield


#: For routes whose answers are cached, but not if the query says how to judge.
TakesTurnToJudge: Final = Depends(_take_turn, scope="function")


def make_turns(settings: Settings) -> Turns:
    wait_seconds = settings.request_seconds * _WAIT_SHARE
    return Turns(NUM_TURNS, purpose="compute pictures and reports", wait_seconds=wait_seconds)


def make_session_turns(settings: Settings) -> Turns:
    wait_seconds = settings.request_seconds * _WAIT_SHARE
    return Turns(NUM_SESSIONS, purpose="read the database", wait_seconds=wait_seconds)


def _copy(response: Response) -> Response:
    """Each request needs an answer of its own: layers change headers."""
    copy = Response(response.body, status_code=response.status_code)
    copy.raw_headers = list(response.raw_headers)
    return copy
