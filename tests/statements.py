"""The statements that a database executes for what a test does, and for nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, event

#: Set where a test asks for something, also in the server that answers it: a request takes the
#: context of its client along. What a server does by itself now and then has a context of its own.
_IS_ASKED: ContextVar[bool] = ContextVar("is_asked", default=False)


class Statement(NamedTuple):
    """SQL, and its parameters; one for many rows is one statement."""

    text: str
    parameters: Any


@contextmanager
def recording(database: Engine | Connection) -> Iterator[list[Statement]]:
    """The statements that the test causes while the context is entered."""
    statements: list[Statement] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if _IS_ASKED.get():
            statements.append(Statement(statement, parameters))

    token = _IS_ASKED.set(True)
    event.listen(database, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(database, "before_cursor_execute", note)
        _IS_ASKED.reset(token)
