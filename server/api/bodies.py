"""Bodies: what those of requests may be, answers without one for HEAD, and what stands in JSON."""

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.problems import SAFE_METHODS, find_presentation, respond
from server.texts import escape_encoded_controls, split_encoded

#: Of every request but an upload.
MAX_BODY_BYTES: Final = 64 * 1024

_TOO_LONG: Final = f"a body may have at most {MAX_BODY_BYTES} bytes here"
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
#: Uploads are no JSON.
_UPLOADS: Final = "/datasets/"


class BodyRules:
    """Answers 413 to bodies that are too long and 415 to those that no route reads, in words that
    say which header is meant.

    FastAPI's own limit of a body would answer before it is known who asks. JSON of another type is
    not taken for what it is: a form of another site can send text that is JSON, but no browser lets
    it set this header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        if refusal := _find_refusal(request):
            await respond(request, *refusal)(scope, receive, send)
        elif _is_upload(request):  # its limit is a setting
            await self._app(scope, receive, send)
        else:
            await self._app(scope, _count(receive), send)


class HeadAsGet:
    """Answers HEAD as GET, without the body (RFC 9110, 9.3.2).

    All that comes after sees a GET: routes, limits, the login. The answer is complete with its
    headers, so that a live stream ends at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        has_answered = False

        async def send_head(message: Message) -> None:
            nonlocal has_answered
            if message["type"] == "http.response.start":
                await send(message)
                # Whoever still waits for the client now learns that it has gone.
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                has_answered = True

        async def receive_until_answered() -> Message:
            return {"type": "http.disconnect"} if has_answered else await receive()

        scope["method"] = "GET"
        try:
            await self._app(scope, receive_until_answered, send_head)
        finally:
            scope["method"] = "HEAD"


class InertJson:
    """Escapes controls in JSON, also in that of events: it has the same value, and a terminal that
    shows it obeys nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        await self._app(scope, receive, _InertAnswer(send).send if is_http else send)


class _InertAnswer:
    """One answer. Its start is sent at once unless it has a length, which then is of one body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_json = False
        self._start: Message | None = None
        self._rest = b""  # the beginning of a character whose end is in the next piece

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            media_type = _read_media_type(headers)
            self._is_json = _is_json(media_type) or media_type == _EVENTS
            if self._is_json and "Content-Length" in headers:
                self._start = message
                return
        elif self._is_json and message["type"] == "http.response.body":
            message = {**message, "body": self._escape(message)}
            await self._send_start(num_bytes=len(message["body"]))
        await self._send(message)

    def _escape(self, message: Message) -> bytes:
        content: bytes = self._rest + message.get("body", b"")
        whole, self._rest = content, b""
        if message.get("more_body", False):
            whole, self._rest = split_encoded(content)
        return escape_encoded_controls(whole)

    async def _send_start(self, *, num_bytes: int) -> None:
        if self._start is not None:
            MutableHeaders(raw=self._start["headers"])["Content-Length"] = str(num_bytes)
            await self._send(self._start)
            self._start = None


def _read_media_type(headers: Headers) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _count(receive: Receive) -> Receive:
    """`receive`, which raises HTTPException 413 for a body that is too long."""
    num_bytes = 0

    async def receive_counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LONG)
        return message

    return receive_counted


def _find_refusal(request: Request) -> tuple[int, str] | None:
    if _claims_too_much(request):
        return 413, _TOO_LONG
    if refusal := _refuse_type(request):
        return 415, refusal
    return None


def _claims_too_much(request: Request) -> bool:
    """Whether `Content-Length` is above the limit; a body without one is counted as it comes."""
    claimed = request.headers.get("Content-Length", "0")
    if _is_upload(request) or not (claimed.isascii() and claimed.isdigit()):
        return False
    return int(claimed[:20]) > MAX_BODY_BYTES


def _refuse_type(request: Request) -> str | None:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        return (
            f"the body is compressed (Content-Encoding: {encoding[:50]}); send it as it is, "
            "without Content-Encoding"
        )
    media_type = _read_media_type(request.headers)
    if not has_body(request.headers) or not _needs_json(request) or _is_json(media_type):
        return None
    sent = f"not {media_type[:100]}" if media_type else "which is missing"
    return f"the body must be JSON: send it with Content-Type: {_JSON}, {sent}"


def has_body(headers: Headers) -> bool:
    """Whether the request says that a body comes with it (RFC 9112, 6)."""
    return headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers


def _needs_json(request: Request) -> bool:
    """Whether no form and no upload belongs here."""
    return not _is_upload(request) and find_presentation(request) is None


def _is_upload(request: Request) -> bool:
    path: str = request.scope["path"]
    return path.startswith(_UPLOADS)


def _is_json(media_type: str) -> bool:
    kind, _, name = media_type.partition("/")
    return kind == "application" and (name == "json" or name.endswith("+json"))
