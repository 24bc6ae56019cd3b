"""Kept answers: what a request with an `Idempotency-Key` was told, for when it is repeated.

An answer says what the job or the study said. So it goes with it, and it goes after a day.
"""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Engine, delete, select, update
from sqlmodel import Session, col

from server.database.engine import database_now, write_transaction
from server.models.columns import utc_now
from server.models.tables import IdempotencyKey, Worker

#: How long a key is remembered.
REMEMBER_FOR: Final = timedelta(days=1)
#: The keys that are remembered of each token, and the bytes of their answers; of more, the oldest
#: are forgotten.
MAX_KEYS: Final = 1000
MAX_BYTES: Final = 64 * 1024 * 1024
_STARTED_AT: Final = utc_now()
_STARTED_SECONDS: Final = time.monotonic()
#: Rows of one statement: databases limit its parameters.
_BATCH_SIZE: Final = 500
#: None of the session's objects is one of these rows.
_UNSEEN: Final = {"synchronize_session": False}


def find_oldest(session: Session) -> datetime:
    """Since when answers are remembered. A clock that was set ahead while this process ran, or a
    machine that slept, makes no answer older."""
    steady_now = _STARTED_AT + timedelta(seconds=time.monotonic() - _STARTED_SECONDS)
    return min(database_now(session), steady_now) - REMEMBER_FOR


def expire_answers(engine: Engine) -> None:
    """Delete the answers that are no longer remembered."""
    with Session(engine) as session:
        expired = col(IdempotencyKey.created_at) < find_oldest(session)
        # Mostly there is none, and nobody should wait for a transaction that writes nothing.
        if session.execute(select(col(IdempotencyKey.key)).where(expired).limit(1)).first() is None:
            return
    with write_transaction(engine) as session:
        session.execute(delete(IdempotencyKey).where(expired), execution_options=_UNSEEN)


def make_room(session: Session, token_name: str, *, num_bytes: int) -> None:
    """Delete the oldest answers of a token, so that a further one of so many bytes can be kept."""
    of_token = col(IdempotencyKey.token_name) == token_name
    newest = (col(IdempotencyKey.created_at).desc(), col(IdempotencyKey.key).desc())
    kept = select(col(IdempotencyKey.key), col(IdempotencyKey.num_bytes)).where(of_token)
    surplus, total = [], num_bytes
    for number, row in enumerate(session.execute(kept.order_by(*newest)), start=1):
        total += row.num_bytes
        if number >= MAX_KEYS or total > MAX_BYTES:
            surplus.append(row.key)
    for first in range(0, len(surplus), _BATCH_SIZE):
        some = col(IdempotencyKey.key).in_(surplus[first : first + _BATCH_SIZE])
        session.execute(delete(IdempotencyKey).where(of_token, some), execution_options=_UNSEEN)


def forget_jobs(session: Session, job_ids: Sequence[str]) -> None:
    """Delete what was kept of these jobs beside their own rows."""
    _forget(session, [f"/jobs/{job_id}" for job_id in job_ids])
    of_jobs = update(Worker).where(col(Worker.job_id).in_(job_ids)).values(job_id=None)
    session.execute(of_jobs, execution_options=_UNSEEN)


def forget_study(session: Session, study_id: str) -> None:
    """Delete the answer that was kept of this study."""
    _forget(session, [f"/studies/{study_id}"])


def _forget(session: Session, locations: Sequence[str]) -> None:
    rows = delete(IdempotencyKey).where(col(IdempotencyKey.location).in_(locations))
    session.execute(rows, execution_options=_UNSEEN)
