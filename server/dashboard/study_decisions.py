"""The decisions of ended studies for their list, which is read every few seconds."""

import threading
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import func, select
from sqlmodel import Session, col

from server.jobs.studies import StudyEntry
from server.judging.decisions import Recommendation
from server.judging.studies import ResultCache, judge_study
from server.models.studies import StudyJob
from server.models.tables import Job

#: Jobs that one request judges at most; the next request goes on.
MAX_JUDGED: Final = 1000
_MAX_CACHED: Final = 1000

Key = tuple[Any, ...]


class DecisionCache:
    """The decisions of studies whose jobs have not changed since."""

    def __init__(self) -> None:
        self._decisions: dict[Key, Recommendation] = {}
        self._lock = threading.Lock()

    def read(
        self, session: Session, entries: Sequence[StudyEntry], *, results: ResultCache
    ) -> dict[str, Recommendation]:
        """The decision of each ended study by its id, without those that would take too long."""
        ended = [entry for entry in entries if entry.status.is_terminal and entry.study.arms]
        keys = _identify(session, ended)
        found: dict[str, Recommendation] = {}
        num_left = MAX_JUDGED
        for entry in ended:
            key, num_jobs = keys[entry.study.id], entry.counts.num_jobs
            known = self._decisions.get(key)
            if known is None and num_left > 0:
                num_left -= num_jobs
                known = judge_study(session, entry.study, cache=results).recommendation
                self._keep(key, known)
            if known is not None:
                found[entry.study.id] = known
        return found

    def _keep(self, key: Key, decision: Recommendation) -> None:
        with self._lock:
            if len(self._decisions) >= _MAX_CACHED:
                self._decisions.clear()
            self._decisions[key] = decision


def _identify(session: Session, entries: Sequence[StudyEntry]) -> dict[str, Key]:
    """Changes whenever a job of the study ends, goes on or is deleted."""
    study_id, job_id = col(StudyJob.study_id), col(StudyJob.job_id)
    state = (
        select(
            study_id,
            func.count(job_id),
            func.sum(col(Job.attempt)),
            func.sum(col(Job.epochs_completed)),
            func.max(col(Job.ended_at)),
        )
        .outerjoin(Job, col(Job.id) == job_id)
        .where(study_id.in_([entry.study.id for entry in entries]))
        .group_by(study_id)
    )
    rows = {row[0]: tuple(row) for row in session.execute(state)}
    return {
        entry.study.id: (
            *rows.get(entry.study.id, (entry.study.id,)),
            tuple(entry.study.looks),
            entry.study.cancel_requested_at,
            tuple(sorted(entry.counts.by_status.items())),
        )
        for entry in entries
    }
