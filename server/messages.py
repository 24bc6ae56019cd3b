"""What this process says: errors as one line for a person, and secrets taken out of every text.

Messages are written without secrets. Redaction is for those of other libraries, which quote what
they were given: a URL with its password, a header with its token. Only entry points register
secrets. Pydantic and SQLAlchemy take long to import, and a command that needs neither must start
fast.
"""

import html
import json
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, quote_plus

from server.environment.access import explain
from server.errors import drop_consequences

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from sqlalchemy.exc import SQLAlchemyError

HIDDEN: Final = "***"

#: A shorter text is no secret, and is a part of many words.
_MIN_LENGTH: Final = 4
#: A secret of this length is also hidden inside a word.
_SURE_LENGTH: Final = 8
#: The stack's own default password, and the name of half of what is shown.
_COMMON_WORDS: Final = frozenset({"losslab", "postgres", "postgresql", "localhost"})

_secrets: set[str] = set()
_pattern: re.Pattern[str] | None = None


def describe_error(error: Exception) -> str:
    """The error in one line."""
    from pydantic import ValidationError  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    match error:
        case ValidationError():
            is_setting = error.title.endswith("Settings")
            items = drop_consequences(error.errors())
            line = "; ".join(_describe_item(item, is_setting=is_setting) for item in items)
        case ValueError(__cause__=OSError() as cause):  # a secret file that cannot be read
            line = explain(cause)
        case SQLAlchemyError():
            line = _describe_database_error(error)
        case OSError():
            line = explain(error)
        case _:
            line = str(error).partition("\n")[0]
    return redact(line)


def hide_secrets(secrets: Iterable[str]) -> None:
    """Take these texts out of everything that is redacted from now on."""
    global _pattern
    known = {text for text in secrets if len(text) >= _MIN_LENGTH}
    _secrets.update(known - _COMMON_WORDS)
    forms = {form for secret in _secrets for form in _list_forms(secret)}
    # The longest first, so that nothing of it is left where a shorter one is its beginning.
    parts = [_match(form) for form in sorted(forms, key=len, reverse=True)]
    _pattern = re.compile("|".join(parts)) if parts else None


def forget_secrets() -> None:
    """For tests, which have many settings in one process."""
    _secrets.clear()
    hide_secrets(())


def redact(text: str) -> str:
    """The text with `***` in place of every secret."""
    return text if _pattern is None else _pattern.sub(HIDDEN, text)


def redact_tracebacks() -> None:
    """Redact the errors that end this process or one of its threads."""
    sys.excepthook = _print_traceback
    threading.excepthook = lambda args: _print_traceback(
        args.exc_type, args.exc_value, args.exc_traceback
    )


def _describe_database_error(error: "SQLAlchemyError") -> str:
    """What the database or its driver says, without the name of its exception."""
    original = getattr(error, "orig", None) or error
    line = "; ".join(part.strip() for part in str(original).splitlines() if part.strip())
    return f"the database cannot be used: {line} (LOSSLAB_DATABASE_URL)"


def _describe_item(item: "ErrorDetails", *, is_setting: bool) -> str:
    """The field, what is allowed, and the input, unless it is a setting, which may be a secret, or
    a whole object."""
    field = ".".join(str(part) for part in item["loc"])
    if field and is_setting:
        field = f"LOSSLAB_{field.upper()}"
    message = item["msg"].removeprefix("Value error, ")
    if not is_setting and not isinstance(item["input"], dict):
        message += f", not {item['input']!r}"
    return f"{field}: {message}" if field else message


def _print_traceback(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error or kind(), trace)
    elif not issubclass(kind, SystemExit):
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _list_forms(secret: str) -> Iterator[str]:
    """The secret as URLs, JSON, HTML and Python's own messages write it."""
    yield secret
    yield quote(secret, safe="")
    yield quote(secret)
    yield quote_plus(secret)
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield html.escape(secret)
    yield repr(secret)[1:-1]
    yield ascii(secret)[1:-1]
    yield repr(secret.encode())[2:-1]


def _match(form: str) -> str:
    escaped = re.escape(form)
    return escaped if len(form) >= _SURE_LENGTH else rf"(?<![A-Za-z0-9]){escaped}(?![A-Za-z0-9])"
