"""Limits per request: bytes of its head, and time."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.bodies import has_body
from server.api.problems import MAY_BE_DONE, RETRY_LATER, SAFE_METHODS, respond

#: A request line with all headers; more is answered 431, or 400 if it arrives in several reads.
MAX_HEADER_BYTES: Final = 16 * 1024
#: Each is looked through several times.
MAX_HEADERS: Final = 100
#: A body goes on if so much of it arrives within the limit.
_MIN_BYTES: Final = 1024

_logger = logging.getLogger(__name__)


class HeaderLimit:
    """Answers 431 to long addresses, and to long or many headers.

    The protocol's own limit only stops headers that arrive in several reads, not in a single one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (detail := _find_excess(scope)) is None:
            await self._app(scope, receive, send)
            return
        await respond(Request(scope), 431, detail)(scope, receive, send)


def _find_excess(scope: Scope) -> str | None:
    if len(scope["headers"]) > MAX_HEADERS:
        return f"a request may have at most {MAX_HEADERS} headers, not {len(scope['headers'])}"
    if _measure_head(scope) > MAX_HEADER_BYTES:
        return f"address and headers may have at most {MAX_HEADER_BYTES} bytes together"
    return None


def _measure_head(scope: Scope) -> int:
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope["raw_path"]) + len(scope["query_string"])


@dataclass(slots=True)
class _Pace:
    """The time limits of one request, whose deadline moves with what arrives."""

    deadline: asyncio.Timeout
    silence_seconds: float
    answer_seconds: float
    is_complete: bool = False  #: the whole body has arrived
    num_new_bytes: int = 0

    def take(self, message: Message) -> None:
        """Note what the client sent. A few bytes, just enough to look alive, move nothing."""
        self.num_new_bytes += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.is_complete:
            self.wait(self.answer_seconds)
        elif self.num_new_bytes >= _MIN_BYTES:
            self.num_new_bytes = 0
            self.wait(self.silence_seconds)

    def wait(self, seconds: float) -> None:
        self.deadline.reschedule(asyncio.get_running_loop().time() + seconds)


class Deadlines:
    """Time limits of a request: answers 408 if no more of the body arrives, 503 if the answer takes
    too long, and closes the connection if the client does not read.

    An upload may last as long as its bytes keep coming, and a stream as long as its client reads. A
    route for uploads allows more time for its answer with `extend_deadline`.

    What was computed for a late answer cannot be stopped within a thread. It keeps its turn and its
    session until that thread has ended, so that nobody else uses them at the same time.
    """

    def __init__(self, app: ASGIApp, *, request_seconds: float, send_seconds: float) -> None:
        self._app = app
        self._request_seconds = request_seconds
        self._send_seconds = send_seconds
        self._late: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def receive_and_track() -> Message:
            message = await receive()
            if not (has_begun or deadline.expired()):
                pace.take(message)
            return message

        async def send_in_time(message: Message) -> None:
            nonlocal has_begun
            if deadline.expired():  # at this moment: it is answered already, or closed
                return
            has_begun = True
            pace.wait(self._send_seconds)
            await send(message)
            if not deadline.expired():
                deadline.reschedule(None)

        try:
            async with asyncio.timeout(self._request_seconds) as deadline:
                pace = _Pace(deadline, self._request_seconds, self._request_seconds)
                Request(scope).state.pace = pace
                await self._run(scope, receive_and_track, send_in_time)
        except TimeoutError:
            if not deadline.expired():
                raise
            if has_begun:
                reason = f"for {self._send_seconds:g} s (LOSSLAB_SEND_SECONDS)"
                _logger.warning("%s: the client does not read the answer %s", scope["path"], reason)
                return
            await _answer_timeout(Request(scope), pace=pace)(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request in a task that outlives a deadline if one of its threads does."""
        limit = anyio.CancelScope()

        async def run() -> None:
            with limit:
                await self._app(scope, receive, send)

        task = asyncio.create_task(run())
        try:
            await asyncio.shield(task)
        finally:
            if not task.done():
                # Unlike a task's own `cancel`, it waits for a thread that runs, and only then frees
                # what the thread used.
                limit.cancel()
                self._late.add(task)
                task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._late.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _logger.warning("a request that was answered already ended: %r", error)


def extend_deadline(request: Request, *, seconds: float) -> None:
    """Let this request's answer take `seconds` from the end of its body."""
    pace: _Pace = request.state.pace
    pace.answer_seconds = seconds
    pace.wait(seconds if pace.is_complete else max(seconds, pace.silence_seconds))


def _answer_timeout(request: Request, *, pace: _Pace) -> Response:
    # If the connection stayed open, the rest of the body would be read as the next request.
    headers = {"Connection": "close"}
    if pace.is_complete or not has_body(request.headers):
        seconds = f"{pace.answer_seconds:g} s (LOSSLAB_REQUEST_SECONDS)"
        detail = f"the answer took longer than {seconds}"
        detail += "; try again" if request.method in SAFE_METHODS else f"; {MAY_BE_DONE}"
        return respond(request, 503, detail, headers=headers | RETRY_LATER)
    detail = (
        f"the request's body did not go on: fewer than {_MIN_BYTES} bytes came in "
        f"{pace.silence_seconds:g} s (LOSSLAB_REQUEST_SECONDS)"
    )
    return respond(request, 408, detail, headers=headers)
