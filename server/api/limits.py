"""Limits per client: time, connections and bytes."""

import asyncio
import logging
from typing import ClassVar, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.problems import MAY_BE_DONE, SAFE_METHODS, respond

#: A request line with all headers; more is answered 431, or 400 if it arrives in several reads.
MAX_HEADER_BYTES: Final = 16 * 1024
MAX_BODY_BYTES: Final = 64 * 1024
MAX_CONNECTIONS: Final = 1000

_logger = logging.getLogger(__name__)


class HttpProtocol(H11Protocol):
    """uvicorn's protocol; it also closes a connection whose headers do not arrive in time."""

    header_seconds: ClassVar[float]
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_between_requests = self.cycle is None or self.cycle.response_complete
        if not is_between_requests:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.header_seconds, self._close_on_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_on_timeout(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def make_protocol(*, header_seconds: float) -> type[HttpProtocol]:
    """The protocol with that much time for headers; uvicorn makes its instances itself."""
    return type("TimedHttpProtocol", (HttpProtocol,), {"header_seconds": header_seconds})


class HeaderLimit:
    """Answers 431 to long addresses and headers.

    The protocol's own limit only stops headers that arrive in several reads, not in a single one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _measure_head(scope) <= MAX_HEADER_BYTES:
            await self._app(scope, receive, send)
            return
        detail = f"address and headers may have at most {MAX_HEADER_BYTES} bytes together"
        await respond(Request(scope), 431, detail)(scope, receive, send)


def _measure_head(scope: Scope) -> int:
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope["raw_path"]) + len(scope["query_string"])


class Deadlines:
    """Time limits of a request: answers 408 if the body does not arrive, 503 if the answer takes
    too long, and closes the connection if the client does not read.

    A stream may last as long as its client reads. A route for uploads allows more time with
    `extend_deadline`.
    """

    def __init__(self, app: ASGIApp, *, request_seconds: float, send_seconds: float) -> None:
        self._app = app
        self._request_seconds = request_seconds
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_body = has_begun = False

        async def receive_and_track() -> Message:
            nonlocal has_body
            message = await receive()
            has_body = not message.get("more_body", False)
            return message

        async def send_in_time(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            deadline.reschedule(asyncio.get_running_loop().time() + self._send_seconds)
            await send(message)
            deadline.reschedule(None)

        try:
            async with asyncio.timeout(self._request_seconds) as deadline:
                Request(scope).state.deadline = deadline
                await self._app(scope, receive_and_track, send_in_time)
        except TimeoutError:
            if not deadline.expired():
                raise
            if has_begun:
                _logger.warning("%s: the client does not read the answer", scope["path"])
                return
            await _answer_timeout(Request(scope), has_body=has_body)(scope, receive, send)


def extend_deadline(request: Request, *, seconds: float) -> None:
    """Set this request's time limit to `seconds` from now."""
    deadline: asyncio.Timeout = request.state.deadline
    deadline.reschedule(asyncio.get_running_loop().time() + seconds)


def _answer_timeout(request: Request, *, has_body: bool) -> Response:
    # If the connection stayed open, the rest of the body would be read as the next request.
    headers = {"Connection": "close"}
    if has_body:
        detail = "the answer took longer than LOSSLAB_REQUEST_SECONDS"
        if request.method not in SAFE_METHODS:
            detail = f"{detail}; {MAY_BE_DONE}"
        return respond(request, 503, detail, headers=headers)
    return respond(request, 408, "the request's body did not arrive in time", headers=headers)
