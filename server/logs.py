"""Logging for entry points: one line per event to stdout, as text or as JSON."""

import codecs
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar

from server.finite import make_finite
from server.messages import redact
from server.texts import show_controls

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(context)s"

_T = TypeVar("_T")

#: The id in every log line of a request.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
#: The job that a thread of a worker works for.
_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


@contextmanager
def mark_job(job_id: str) -> Iterator[None]:
    """Add the job's id to every log line of this thread while the context is entered."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


def keep_marks(work: Callable[[], _T]) -> Callable[[], _T]:
    """The same work for another thread, whose lines then have the marks of this one's."""
    return partial(copy_context().run, work)


def is_of_job(job_id: str) -> Callable[[logging.LogRecord], bool]:
    """A filter of the lines of threads that work for this job."""
    return lambda _record: _job_id.get() == job_id


def _add_context(record: logging.LogRecord) -> bool:
    marks = {"request_id": request_id.get(), "job_id": _job_id.get()}
    known = {name: value for name, value in marks.items() if value is not None}
    record.__dict__["marks"] = known
    record.__dict__["context"] = "".join(f" {name}={value}" for name, value in known.items())
    return True


def _is_of_losslab(record: logging.LogRecord) -> bool:
    """Whether a message is for the operator: scipy's optimizer tells each step to the root."""
    return record.name != "root" or "scipy" not in record.pathname


class LineFormatter(logging.Formatter):
    """Puts a message on one line, even if it quotes several; a traceback keeps its lines. Controls
    are shown, in both."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(show_controls(super().format(record)))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        return " ".join(super().formatMessage(record).splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "marks", {}),
            **getattr(record, "values", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(make_finite(entry), allow_nan=False))


class FileLog(logging.Handler):
    """Appends lines to a file. If the disk takes no more, lines are left out, and their number is
    told once it does: what is logged must not break on its log."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # Without a buffer: what it could not write would be written twice, or when it is closed.
        self._file = path.open("ab", buffering=0)
        self._num_lost = 0
        self._is_torn = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._num_lost:
            line = f"{self._num_lost} lines are missing: the log could not be written\n{line}"
        self._write(f"{line}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        self._file.close()
        super().close()

    def _write(self, content: bytes) -> None:
        begin = b"\n" if self._is_torn else b""
        try:
            num_written = self._file.write(begin + content) or 0
        except OSError:
            self._num_lost += 1
            return
        self._is_torn = num_written < len(begin + content)
        self._num_lost = self._num_lost + 1 if self._is_torn else 0


#: How letters of our messages are spelt where an encoding lacks them.
_SPELLINGS = {
    "β": "beta", "γ": "gamma", "λ": "lambda", "μ": "mu", "σ": "sigma", "·": "-", "–": "-",
    "—": "-", "…": "...", "×": "x", "≤": "<=", "≥": ">=", "±": "+-", "→": "->", "−": "-",
    "²": "^2", "“": '"', "”": '"', "‘": "'", "’": "'", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip
_SPELL_ERRORS = "losslab.spell"


def spell_letters() -> None:
    """Let the output of this process spell or escape letters that its encoding lacks, such as β.

    The encoding follows from the environment (LC_ALL, PYTHONIOENCODING), and the text may be a
    user's. A name that is no text at all, as of a file with odd bytes, is escaped as well.
    """
    codecs.register_error(_SPELL_ERRORS, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELL_ERRORS)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    spelt = (_SPELLINGS.get(each) or ascii(each)[1:-1] for each in letters)
    return "".join(spelt), error.end


class _Output(logging.StreamHandler[TextIO]):
    """Standard output. If it takes no more, as on a full disk, that is said once and no line is
    kept: a service goes on without its log."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            with suppress(OSError):
                sys.stderr.write(f"the log cannot be written: {error.strerror}\n")


def configure_logging(*, as_json: bool, log_path: Path | None = None) -> None:
    """Set up logging. Only entry points call this."""
    spell_letters()
    handlers: list[logging.Handler] = [_Output(sys.stdout)]
    if log_path is not None:
        handlers.append(FileLog(log_path))
    formatter = JsonFormatter() if as_json else LineFormatter(_FORMAT)
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(_is_of_losslab)
        handler.addFilter(_add_context)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    # httpx logs every request at INFO, alembic every migration.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
