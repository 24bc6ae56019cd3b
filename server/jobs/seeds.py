"""The seeds of a study: queueing their jobs, or taking finished ones instead.

A study and its jobs are stored in one transaction, so that a study never has half of its jobs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import insert, select
from sqlmodel import Session, col

from server.database.engine import database_now
from server.jobs.admission import Admission
from server.jobs.batches import enqueue_all
from server.jobs.options import BUILT_IN_OPTIONS, UnknownOptionError, read_options
from server.jobs.studies import MAX_SEEDS, StudyStateError, count_jobs, derive_status, lock_study
from server.jobs.submission import new_job
from server.models.configuration import TrainingConfig, check_config, read_config
from server.models.studies import Arm, StoredStudyError, Study, StudyJob
from server.models.tables import IS_JUDGED, Job, JobStatus, OwnOption, new_id

#: What a job's row takes from the model of its arm, apart from these.
_OWN_VALUES: Final = ("id", "name", "config", "created_at")


class TooManySeedsError(StudyStateError):
    """A study would have more seeds than allowed."""

    field = "num"


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where in its study a job belongs."""

    position: int
    seed: int
    arm_index: int
    arm: Arm

    @property
    def key(self) -> tuple[str, int]:
        """Jobs with the same are the same run."""
        return self.arm.config_sha256, self.seed


def submit_study(
    session: Session, study: Study, *, seeds: Sequence[int], admission: Admission | None = None
) -> Study:
    """Store a study and queue its jobs, in the caller's transaction.

    Raises what `admission` raises, and UnknownOptionError if one of its options was deleted
    meanwhile.
    """
    _hold_options(session, study)
    study.created_at = database_now(session)
    study.seeds, study.rounds = [], []
    study.client = admission.client if admission is not None else ""
    session.add(study)
    session.flush()
    add_seeds(session, study, seeds, admission=admission)
    return study


def add_seeds(
    session: Session,
    study: Study,
    seeds: Sequence[int],
    *,
    arms: Iterable[str] | None = None,
    admission: Admission | None = None,
) -> int:
    """Queue further seeds of the named arms, of all without names; returns the number of jobs.

    Seed by seed with the arms in turn, so that an early look is balanced. An arm that lacks earlier
    seeds of the study gets those as well. A finished job of the same identity and seed is taken
    instead if the study asked for that. Raises what `admission` raises.
    """
    study.seeds = [*study.seeds, *seeds]
    study.rounds = [*study.rounds, len(study.seeds)] if seeds else study.rounds
    places = _find_open_places(session, study, arms=None if arms is None else set(arms))
    reused = _hold_reusable(session, study, places)
    fresh = [place for place in places if place not in reused]
    if fresh and admission is not None:
        datasets = [place.arm.config["dataset"] for place in fresh]
        admission.check(session, num_jobs=len(fresh), datasets=datasets)
        study.queued_by = admission.queued_by
    jobs = _make_jobs(study, fresh)
    session.flush()
    enqueue_all(session, list(jobs.values()))
    ids = reused | {place: job["id"] for place, job in jobs.items()}
    links = [
        {
            "study_id": study.id,
            "seed": place.seed,
            "arm": place.arm_index,
            "position": place.position,
            "job_id": ids[place],
            "is_reused": place in reused,
        }
        for place in places
    ]
    if links:
        session.execute(insert(StudyJob), links)
    return len(links)


def extend_study(
    session: Session,
    study_id: str,
    *,
    num_seeds: int,
    arms: Iterable[str] | None,
    looks: Sequence[int],
    admission: Admission | None = None,
) -> Study:
    """Queue further seeds and plan `looks` at them; a study that was cancelled goes on with them.

    Raises StudyStateError above the limits and while the study is paused, StoredStudyError, and
    what `admission` raises.
    """
    study = lock_study(session, study_id)
    if not (study.seeds and study.looks):
        raise StoredStudyError("another version of Losslab stored the seeds or looks of this study")
    total = len(study.seeds) + num_seeds
    if total > MAX_SEEDS:
        raise TooManySeedsError(
            f"study {study.id} has {len(study.seeds)} seeds, and with {num_seeds} more it would "
            f"have {total}; {MAX_SEEDS} are allowed"
        )
    counts = count_jobs(session, [study.id])[study.id].by_status
    if derive_status(study, counts) == JobStatus.paused:
        raise StudyStateError(f"study {study.id} is paused; resume it before adding seeds")
    study.cancel_requested_at = study.decided_at = None
    study.max_seeds = max(study.max_seeds, total)
    study.looks = list(looks)
    seeds = next_seeds(study, num=num_seeds)
    add_seeds(session, study, seeds, arms=arms, admission=admission)
    return study


def next_seeds(study: Study, *, num: int) -> list[int]:
    """The smallest seeds that the study does not have."""
    taken = set(study.seeds)
    candidates = (seed for seed in range(len(taken) + num) if seed not in taken)
    return [seed for seed, _ in zip(candidates, range(num), strict=False)]


def count_reusable(session: Session, study: Study, seeds: Sequence[int]) -> int:
    """How many of the study's jobs with these seeds would not be trained again."""
    known = _find_reusable(session, study, arms=study.arm_list)
    return sum((arm.config_sha256, seed) in known for arm in study.arm_list for seed in seeds)


def _hold_options(session: Session, study: Study) -> None:
    """Keep the study's own options from being deleted until it is stored."""
    names = {arm.option for arm in study.arm_list} - BUILT_IN_OPTIONS.keys()
    if not names:
        return
    held = select(col(OwnOption.name)).where(col(OwnOption.name).in_(names))
    found = set(session.scalars(held.order_by(col(OwnOption.name)).with_for_update(read=True)))
    for name in sorted(names - found):
        raise UnknownOptionError(name, allowed=read_options(session), field="options")


def _find_open_places(session: Session, study: Study, *, arms: set[str] | None) -> list[_Place]:
    """Where the arms have no job yet, in the order in which they should run."""
    rows = select(col(StudyJob.position), col(StudyJob.arm)).where(
        col(StudyJob.study_id) == study.id
    )
    taken = {(row.position, row.arm) for row in session.execute(rows)}
    wanted = [
        (index, arm) for index, arm in enumerate(study.arm_list) if arms is None or arm.name in arms
    ]
    return [
        _Place(position, seed, index, arm)
        for position, seed in enumerate(study.seeds)
        for index, arm in wanted
        if (position, index) not in taken
    ]


def _make_jobs(study: Study, places: Sequence[_Place]) -> dict[_Place, dict[str, Any]]:
    """The values of the rows of new jobs; those of one arm differ in little."""
    arms = {place.arm_index: place.arm for place in places}
    models = {index: _make_model(study, arm) for index, arm in arms.items()}
    return {
        place: {
            **models[place.arm_index],
            "id": new_id(),
            "name": f"{place.arm.name} seed {place.seed}",
            "config": {**place.arm.config, **_choose_seeds(study, place.seed)},
        }
        for place in places
    }


def _choose_seeds(study: Study, seed: int) -> dict[str, int]:
    return {"seed": seed, "data_seed": seed if study.data_seed is None else study.data_seed}


def _make_model(study: Study, arm: Arm) -> dict[str, Any]:
    job = new_job(
        check_config(arm.config),
        option=arm.option,
        quick_test=study.quick_test,
        labels=study.labels,
        priority=study.priority,
    )
    job.config_sha256 = arm.config_sha256
    job.study_id, job.queued_by, job.client = study.id, study.queued_by, study.client
    return job.model_dump(exclude=set(_OWN_VALUES))


def _hold_reusable(session: Session, study: Study, places: Sequence[_Place]) -> dict[_Place, str]:
    """The finished jobs that are taken, which nobody can delete until the study is stored."""
    arms = {place.arm_index: place.arm for place in places}
    known = _find_reusable(session, study, arms=list(arms.values()))
    found = {place: known[place.key] for place in places if place.key in known}
    if not found:
        return {}
    rows = select(col(Job.id)).where(col(Job.id).in_(found.values()), IS_JUDGED)
    held = set(session.scalars(rows.order_by(col(Job.id)).with_for_update(read=True)))
    return {place: job_id for place, job_id in found.items() if job_id in held}


def _find_reusable(
    session: Session, study: Study, *, arms: Sequence[Arm]
) -> dict[tuple[str, int], str]:
    """Judged jobs on the study's own data by identity and seed, of each the newest."""
    return {
        (sha256, config.seed): job_id
        for job_id, sha256, config in (_read_judged(session, arms) if study.reuse else ())
        if config.data_seed == _choose_seeds(study, config.seed)["data_seed"]
    }


def _read_judged(
    session: Session, arms: Sequence[Arm]
) -> Iterator[tuple[str, str, TrainingConfig]]:
    """Id, identity and configuration of the judged jobs of these arms, oldest first."""
    jobs = (
        select(col(Job.id), col(Job.config_sha256), col(Job.config))
        .where(col(Job.config_sha256).in_([arm.config_sha256 for arm in arms]), IS_JUDGED)
        .order_by(col(Job.created_at), col(Job.id))
    )
    for row in session.execute(jobs):
        yield row.id, row.config_sha256, read_config(row.config)
