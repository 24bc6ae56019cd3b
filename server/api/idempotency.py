"""`Idempotency-Key`: a repeated request gets the first answer and is not executed again.

A route calls `find_replay`, then `answer_once`.

The answer is kept in the transaction that executes the request, so it is stored if and only if the
request took effect.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, Self

from fastapi import Header, Response
from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, delete

from server.database.engine import database_now, write_transaction
from server.errors import InvalidInputError
from server.jobs.answers import find_oldest, make_room
from server.models.tables import IdempotencyKey
from server.patterns import Matching

_KEY_RULE: Final = "a key: 1 to 255 letters, digits and signs of ASCII, without spaces"

IdempotencyKeyHeader = Annotated[
    Annotated[str, Matching(r"^[!-~]{1,255}$", _KEY_RULE)] | None, Header()
]


class KeyReusedError(InvalidInputError):
    """The key was used before with a different body."""

    field = "Idempotency-Key"


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request that a client may repeat: its key, the name of its token, its body as sent."""

    key: str
    token_name: str
    body: str

    @classmethod
    def of(
        cls, key: str | None, *, token_name: str, request: BaseModel, resource: str = ""
    ) -> Self | None:
        """None for a request without a key; `resource` is the id of what it changes."""
        if key is None:
            return None
        body = resource + request.model_dump_json(exclude_unset=True)
        return cls(key, token_name=token_name, body=body)

    @property
    def body_sha256(self) -> str:
        return hashlib.sha256(self.body.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer's JSON body and the address of the created resource."""

    body: str
    location: str
    is_replayed: bool = False


def answer_once(
    engine: Engine,
    request: KeyedRequest | None,
    *,
    execute: Callable[[Session], Answer],
    status_code: int = 201,
) -> Response:
    """Execute the request in a transaction with its answer, or answer as the first time.

    Without a key the request is always executed. Raises KeyReusedError and what `execute` raises.
    """
    try:
        return _send(_execute(engine, request, execute=execute), status_code=status_code)
    except IntegrityError:
        # The same request arrived twice at the same time, and the other one was stored first.
        if replay := find_replay(engine, request, status_code=status_code):
            return replay
        raise


def find_replay(
    engine: Engine, request: KeyedRequest | None, *, status_code: int = 201
) -> Response | None:
    """The answer to this request from before, if any. Raises KeyReusedError."""
    if request is None:
        return None
    with Session(engine) as session:
        answer = find_answer(session, request)
    return None if answer is None else _send(answer, status_code=status_code)


def _execute(
    engine: Engine, request: KeyedRequest | None, *, execute: Callable[[Session], Answer]
) -> Answer:
    with write_transaction(engine) as session:
        answer = execute(session)
        if request is not None:
            keep_answer(session, request, answer)
    return answer


def _send(answer: Answer, *, status_code: int) -> Response:
    headers = {"Location": answer.location}
    if answer.is_replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(
        answer.body, status_code=status_code, media_type="application/json", headers=headers
    )


def find_answer(session: Session, request: KeyedRequest) -> Answer | None:
    """The answer to this request from before, if any. Raises KeyReusedError."""
    known = session.get(IdempotencyKey, (request.token_name, request.key))
    if known is None or known.created_at < find_oldest(session):
        return None
    if known.body_sha256 != request.body_sha256:
        message = f"{request.key!r} was used with another body; each request needs its own key"
        raise KeyReusedError(message)
    return Answer(known.answer, known.location, is_replayed=True)


def keep_answer(session: Session, request: KeyedRequest, answer: Answer) -> None:
    """Store the answer and delete expired ones, and the oldest of too many.

    Raises sqlalchemy.exc.IntegrityError if the same request is answered at the same time.
    """
    oldest = find_oldest(session)
    session.exec(delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < oldest))
    num_bytes = len(answer.body.encode())
    make_room(session, request.token_name, num_bytes=num_bytes)
    session.add(
        IdempotencyKey(
            token_name=request.token_name,
            key=request.key,
            body_sha256=request.body_sha256,
            answer=answer.body,
            num_bytes=num_bytes,
            location=answer.location,
            created_at=database_now(session),
        )
    )
    session.flush()
