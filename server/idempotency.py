"""`Idempotency-Key`: a request that is sent again is answered again, and done once."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, delete

from server.database import database_now
from server.models import IdempotencyKey, Job

#: What a transaction shall add to the job that it makes.
Also = Callable[[Session, Job], None]

#: How long a key is remembered.
REMEMBER_FOR = timedelta(days=1)


class KeyReusedError(ValueError):
    """The key came with another body before."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client is told, as JSON, and where what was made lies."""

    body: str
    location: str
    is_replayed: bool = False


def do_once(
    engine: Engine,
    do: Callable[[Also], Job],
    *,
    key: str,
    token_name: str,
    body: str,
    describe: Callable[[Job], Answer],
) -> Answer:
    """Let `do` make a job, and keep the answer in the same transaction; or replay the answer.

    `do` gets what it shall call within its transaction. Keys of different tokens differ.
    Raises KeyReusedError, and what `do` raises.
    """
    body_sha256 = hashlib.sha256(body.encode()).hexdigest()

    def remember(session: Session, job: Job) -> None:
        now = database_now(session)
        session.exec(
            delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < now - REMEMBER_FOR)
        )
        answer = describe(job)
        session.add(
            IdempotencyKey(
                token_name=token_name,
                key=key,
                body_sha256=body_sha256,
                answer=answer.body,
                location=answer.location,
                created_at=now,
            )
        )

    known = _find(engine, key=key, token_name=token_name)
    if known is None:
        try:
            return describe(do(remember))
        except IntegrityError:
            # The same request came twice at a time, and the other one was quicker.
            known = _find(engine, key=key, token_name=token_name)
            if known is None:
                raise
    if known.body_sha256 != body_sha256:
        raise KeyReusedError(f"{key!r} came with another body before; each request needs its own")
    return Answer(known.answer, known.location, is_replayed=True)


def _find(engine: Engine, *, key: str, token_name: str) -> IdempotencyKey | None:
    with Session(engine) as session:
        known = session.get(IdempotencyKey, (token_name, key))
        if known is not None and known.created_at >= database_now(session) - REMEMBER_FOR:
            return known
        return None
