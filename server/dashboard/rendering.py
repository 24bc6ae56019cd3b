"""Rendering of pages: templates, static files and security headers."""

import gzip
import hashlib
import json
import mimetypes
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from server.api.addresses import locate, locate_base
from server.judging.numbers import NO_VALUE, format_number, format_share
from server.models.columns import utc_now
from server.texts import make_inert, show_controls

_STATIC_DIR = Path(__file__).parent / "static"
_HASH_LENGTH = 16
#: Of a static file, so that a client that does not read it keeps no copy of the whole.
_PIECE_BYTES = 32 * 1024
#: They end an embedding, an override or an isolate that began before them.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: browsers would then also hide the origin of a form.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

router = APIRouter(include_in_schema=False)


class StaticFiles:
    """The files in `static/`, each under a URL with a hash of its content.

    Each is compressed once, not for each request.
    """

    def __init__(self, directory: Path) -> None:
        self._contents = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        self._compressed = {
            name: gzip.compress(content, compresslevel=6, mtime=0)
            for name, content in self._contents.items()
        }
        self._hashes = {
            name: hashlib.sha256(content).hexdigest()[:_HASH_LENGTH]
            for name, content in self._contents.items()
        }

    def url(self, name: str) -> str:
        return locate(f"/static/{self._hashes[name]}/{name}")

    def read(self, name: str, *, content_hash: str, compressed: bool = False) -> bytes | None:
        contents = self._compressed if compressed else self._contents
        return contents[name] if self._hashes.get(name) == content_hash else None


_static_files = StaticFiles(_STATIC_DIR)


@router.get("/static/{content_hash}/{name:path}")
async def read_static_file(content_hash: str, name: str, request: Request) -> Response:
    """A static file. Its content never changes under its URL."""
    compressed = "gzip" in request.headers.get("Accept-Encoding", "")
    content = _static_files.read(name, content_hash=content_hash, compressed=compressed)
    if content is None:
        raise HTTPException(404, f"there is no file {name!r} with this hash")
    headers = {
        "Cache-Control": "public, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Length": str(len(content)),
        "Vary": "Accept-Encoding",
    }
    if compressed:
        headers["Content-Encoding"] = "gzip"
    media_type = mimetypes.guess_type(name)[0] or "text/plain"
    return StreamingResponse(_cut(content), media_type=media_type, headers=headers)


async def _cut(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


def render_page(
    template: str, request: Request, *, status_code: int = 200, **values: Any
) -> HTMLResponse:
    """A complete page. The template escapes all `values`."""
    html = _environment.get_template(template).render(request=request, **values)
    return HTMLResponse(html, status_code=status_code, headers=_HEADERS)


def is_refresh(request: Request) -> bool:
    """Whether an open page requests its own update."""
    return "losslab-refresh" in request.headers


@router.get("/docs")
def show_docs(request: Request) -> HTMLResponse:
    """The interactive description of the API."""
    page = render_page("docs.html", request)
    # Swagger UI's style sheet has its icons as data URLs.
    policy = _HEADERS["Content-Security-Policy"].replace("img-src", "img-src data:")
    page.headers["Content-Security-Policy"] = policy
    return page


def encode_data(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`, escaped so that it cannot contain a tag."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def format_size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def format_words(name: str) -> str:
    """`not_mode_collapsed` as `not mode collapsed`."""
    return name.replace("_", " ")


def format_epochs(epochs: list[int]) -> str:
    """Epochs as ranges, `1–5, 8`, shortened after four ranges to keep the table readable."""
    if not epochs:
        return NO_VALUE
    runs: list[list[int]] = []
    for epoch in epochs:
        if runs and epoch == runs[-1][-1] + 1:
            runs[-1][1:] = [epoch]
        else:
            runs.append([epoch])
    shown = ", ".join("–".join(map(str, dict.fromkeys(run))) for run in runs[:4])
    return shown if len(runs) <= 4 else f"{shown} and {len(runs) - 4} more"


def mark_age(moment: datetime) -> Markup:
    """The age of a time, as `5 s ago`."""
    seconds = max(0.0, (utc_now() - moment).total_seconds())
    return Markup('<time datetime="{}" data-age>{} ago</time>').format(
        moment.isoformat(timespec="seconds"), format_seconds(seconds)
    )


def mark_time(moment: datetime | None) -> Markup:
    """A time in UTC, which the script converts to the reader's time zone."""
    if moment is None:
        return Markup(NO_VALUE)
    return Markup('<time datetime="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), f"{moment:%Y-%m-%d %H:%M:%S} UTC"
    )


class InertText(str):
    """A text that begins and ends its own direction."""

    @classmethod
    def of(cls, text: str) -> Self:
        return cls(make_inert(text))


def keep_inert(value: Any) -> Any:
    """What a template prints, with no control that has an effect, and nothing that would end a
    `<bdi>` before its own end."""
    if not isinstance(value, str) or isinstance(value, InertText):
        return value
    # Markup stays what it is.
    return type(value)(shown) if (shown := show_controls(value)) != value else value


_environment = Environment(
    loader=PackageLoader("server.dashboard"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=keep_inert,
)
_environment.globals.update(
    static_url=_static_files.url,
    now=utc_now,
    root=lambda: locate(""),
    base_url=locate_base,
)
_environment.filters.update(
    inert=InertText.of,
    data=encode_data,
    number=format_number,
    share=format_share,
    size=format_size,
    seconds=format_seconds,
    words=format_words,
    epochs=format_epochs,
    time=mark_time,
    age=mark_age,
)
