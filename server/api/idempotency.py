"""`Idempotency-Key`: a request that is sent again is answered again, and done once.

Both functions work in the transaction that does what is asked: the answer is kept if and only if
it was done.
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
    """The key came with another body before."""

    field = "Idempotency-Key"


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """What a client may send again: its key, whose token it is, and the body as sent."""

    key: str
    token_name: str
    body: str

    @property
    def body_sha256(self) -> str:
        return hashlib.sha256(self.body.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client is told, as JSON, and the address of what was made."""

    body: str
    location: str
    is_replayed: bool = False


def find_answer(session: Session, request: KeyedRequest) -> Answer | None:
    """The answer that this request got before. Raises KeyReusedError."""
    known = session.get(IdempotencyKey, (request.token_name, request.key))
    if known is None or known.created_at < database_now(session) - REMEMBER_FOR:
        return None
    if known.body_sha256 != request.body_sha256:
        message = f"{request.key!r} came with another body before; each request needs its own"
        raise KeyReusedError(message)
    return Answer(known.answer, known.location, is_replayed=True)


def keep_answer(session: Session, request: KeyedRequest, answer: Answer) -> None:
    """Remember the answer, and forget those that are too old.

    Raises sqlalchemy.exc.IntegrityError if the same request is being answered at this moment.
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
