"""`Idempotency-Key`: a repeated request gets the first answer and is not executed again.

The answer is kept in the transaction that executes the request, so it is stored if and only if the
request took effect.
"""

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlmodel import Session, col, delete

from server.database.engine import database_now
from server.errors import InvalidInputError
from server.models.tables import IdempotencyKey

#: How long a key is remembered.
REMEMBER_FOR: Final = timedelta(days=1)


class KeyReusedError(InvalidInputError):
    """The key was used before with a different body."""

    field = "Idempotency-Key"


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request that a client may repeat: its key, the name of its token, its body as sent."""

    key: str
    token_name: str
    body: str

    @property
    def body_sha256(self) -> str:
        return hashlib.sha256(self.body.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer's JSON body and the address of the created resource."""

    body: str
    location: str
    is_replayed: bool = False


def find_answer(session: Session, request: KeyedRequest) -> Answer | None:
    """The answer to this request from before, if any. Raises KeyReusedError."""
    known = session.get(IdempotencyKey, (request.token_name, request.key))
    if known is None or known.created_at < database_now(session) - REMEMBER_FOR:
        return None
    if known.body_sha256 != request.body_sha256:
        message = f"{request.key!r} was used with another body; each request needs its own key"
        raise KeyReusedError(message)
    return Answer(known.answer, known.location, is_replayed=True)


def keep_answer(session: Session, request: KeyedRequest, answer: Answer) -> None:
    """Store the answer and delete expired ones.

    Raises sqlalchemy.exc.IntegrityError if the same request is answered at the same time.
    """
    now = database_now(session)
    session.exec(delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < now - REMEMBER_FOR))
    session.add(
        IdempotencyKey(
            token_name=request.token_name,
            key=request.key,
            body_sha256=request.body_sha256,
            answer=answer.body,
            location=answer.location,
            created_at=now,
        )
    )
    session.flush()
