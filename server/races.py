"""Races: studies that queue the seeds of their next look by themselves, until one arm is decided.

The server looks at them every second. What is stored decides what is due, so that a race goes on
after a restart, and two servers on one database queue nothing twice.
"""

import logging
from dataclasses import replace

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

from server.database.engine import database_now, write_transaction
from server.jobs import seeds, studies
from server.jobs.admission import Admission, QueueFullError
from server.judging.criteria import CriteriaSet, read_thresholds
from server.judging.statistics import load_library
from server.judging.studies import ResultCache, StudyVerdict, judge_study
from server.models.studies import StoredStudyError, Study

_logger = logging.getLogger(__name__)


def advance_races(engine: Engine, *, cache: ResultCache, admission: Admission) -> int:
    """Queue the next look of every race whose jobs have all ended; returns their number.

    Raises sqlalchemy.exc.SQLAlchemyError if the database does not answer.
    """
    with Session(engine) as session:
        due = studies.list_due_races(session)
    for study_id in due:
        try:
            _advance(engine, study_id, cache=cache, admission=admission)
        except (QueueFullError, StoredStudyError) as error:
            _logger.warning("the next look of study %s waits: %s", study_id, error)
        except studies.StudyNotFoundError:
            _logger.info("study %s was deleted", study_id)
        except SQLAlchemyError:
            raise
        except Exception:
            # One study that cannot be judged should not stop the races of all others.
            _logger.exception("the race of study %s does not go on", study_id)
    return len(due)


def _advance(engine: Engine, study_id: str, *, cache: ResultCache, admission: Admission) -> None:
    load_library()
    with Session(engine) as session:
        study = studies.find_study(session, study_id)
        check_rules(study)
        verdict = judge_study(session, study, cache=cache)
        num_seeds = len(study.seeds)
    with write_transaction(engine) as session:
        study = studies.lock_study(session, study_id)
        # Another server may have been faster, or the study was stopped or resumed meanwhile.
        if len(study.seeds) == num_seeds and studies.is_due(session, study):
            own = replace(admission, queued_by=study.queued_by)
            _queue_next_look(session, study, verdict, admission=own)


def check_rules(study: Study) -> None:
    """A page may leave out what another version stored, but a race ends arms and itself for good.

    Raises StoredStudyError.
    """
    is_judged_by_all = (
        study.criteria in set(CriteriaSet)
        and study.thresholds.items() <= read_thresholds(study.thresholds).model_dump().items()
    )
    if not (is_judged_by_all and study.seeds and study.looks):
        raise StoredStudyError("another version of Losslab stored its rules or its looks")


def _queue_next_look(
    session: Session, study: Study, verdict: StudyVerdict, *, admission: Admission
) -> None:
    num_jobs = 0
    if verdict.next_look is not None:
        missing = seeds.next_seeds(study, num=max(0, verdict.next_look - len(study.seeds)))
        num_jobs = seeds.add_seeds(session, study, missing, arms=verdict.kept, admission=admission)
    if num_jobs:
        _logger.info("study %s queues %d jobs of its next look", study.id, num_jobs)
    else:
        # Decided, at its last seed, or no seed of the last round was judged.
        study.decided_at = database_now(session)
        _logger.info("the race of study %s is over: %s", study.id, verdict.recommendation.reason)
