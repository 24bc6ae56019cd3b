"""What decides, in the transaction that queues jobs, whether they are taken: the limit of the
queue, the share of one token, and the data sets that there are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sqlmodel import Session, col, func, select

from server.database.engine import take_turn
from server.errors import TooManyRequestsError
from server.files.datasets import check_present
from server.models.tables import Job, JobStatus
from server.settings import Settings
from server.tokens import TokenScope

#: What one token can have of the queue, if there are others that can queue jobs.
_SHARE_OF_ONE_TOKEN: Final = 3 / 4


class QueueFullError(TooManyRequestsError):
    """The maximum number of jobs is queued."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits at which jobs are queued, also those of a study and those that are resumed."""

    datasets_dir: Path
    max_queued_jobs: int | None = None  #: None for a user's own jobs, without a server
    max_of_token: int | None = None  #: None if there is no other token
    queued_by: str = ""  #: the name of the token that queues; empty without one
    client: str = ""  #: the program that queues, in its own words

    @classmethod
    def of(cls, settings: Settings, *, queued_by: str = "", client: str = "") -> Self:
        """Those of a server."""
        num_tokens = sum(token.scope is TokenScope.full for token in settings.tokens)
        share = math.ceil(settings.max_queued_jobs * _SHARE_OF_ONE_TOKEN)
        return cls(
            settings.datasets_dir,
            max_queued_jobs=settings.max_queued_jobs,
            max_of_token=share if num_tokens > 1 else None,
            queued_by=queued_by,
            client=client,
        )

    def check(self, session: Session, *, num_jobs: int, datasets: Iterable[str]) -> None:
        """Let so many further jobs be queued by this transaction, which has locked the rows that it
        changes. What is seen here holds until it ends: no data set is deleted, and nobody else
        queues jobs.

        Raises DatasetError if a data set is gone, and QueueFullError.
        """
        take_turn(session)
        for name in dict.fromkeys(datasets):
            check_present(name, datasets_dir=self.datasets_dir)
        if num_jobs and self.max_queued_jobs is not None:
            _check_queue(session, num_jobs=num_jobs, max_queued_jobs=self.max_queued_jobs)
        if num_jobs and self.max_of_token is not None and self.queued_by:
            self._check_share(session, num_jobs=num_jobs, max_of_token=self.max_of_token)

    def _check_share(self, session: Session, *, num_jobs: int, max_of_token: int) -> None:
        num_queued = count_queued(session, queued_by=self.queued_by)
        if num_queued + num_jobs > max_of_token:
            raise QueueFullError(
                f"{num_queued} jobs of the token {self.queued_by!r} wait already, and one token "
                f"gets {max_of_token} places, three quarters of the queue "
                "(LOSSLAB_MAX_QUEUED_JOBS); try again later"
            )


def count_queued(
    session: Session, *, job_id: str | None = None, queued_by: str | None = None
) -> int:
    """The number of queued jobs, including those whose retry is not due yet."""
    waiting = select(func.count()).select_from(Job).where(Job.status == JobStatus.queued)
    if job_id is not None:
        waiting = waiting.where(col(Job.id) == job_id)
    if queued_by is not None:
        waiting = waiting.where(col(Job.queued_by) == queued_by)
    return session.exec(waiting).one()


def _check_queue(session: Session, *, num_jobs: int, max_queued_jobs: int) -> None:
    num_queued = count_queued(session)
    if num_queued + num_jobs <= max_queued_jobs:
        return
    if num_jobs == 1:
        raise QueueFullError(f"{max_queued_jobs} jobs wait already; try again later")
    raise QueueFullError(
        f"{num_queued} jobs wait already, and with {num_jobs} more they would be above "
        f"{max_queued_jobs} (LOSSLAB_MAX_QUEUED_JOBS); try again later"
    )
