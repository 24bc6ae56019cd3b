"""How long jobs will take, by those that have succeeded."""

import statistics
from collections.abc import Sequence
from typing import Final

from sqlalchemy import select
from sqlmodel import Session, col

from server.models.columns import count_seconds
from server.models.configuration import DEFAULT_NUM_SAMPLES, TrainingConfig, read_config
from server.models.studies import Arm
from server.models.tables import Job, JobStatus

#: Jobs by whose duration that of others is estimated.
_NUM_ESTIMATING: Final = 50


def estimate_seconds(session: Session, arms: Sequence[Arm], *, num_workers: int) -> float | None:
    """The seconds that one job of each arm takes together; None before any job has ended.

    By the newest jobs that succeeded: those of the same configuration, else by their grids.
    """
    newest = (
        select(col(Job.config_sha256), col(Job.config), col(Job.started_at), col(Job.ended_at))
        .where(col(Job.status) == JobStatus.succeeded)
        .order_by(col(Job.created_at).desc(), col(Job.id).desc())
    )
    by_identity: dict[str, list[float]] = {}
    per_grid: list[float] = []
    for sha256, config, started_at, ended_at in session.execute(newest.limit(_NUM_ESTIMATING)):
        if (seconds := count_seconds(started_at, ended_at)) is not None:
            by_identity.setdefault(sha256, []).append(seconds)
            per_grid.append(seconds / _count_grids(read_config(config)))
    if not per_grid:
        return None
    speed = statistics.median(per_grid)
    of_arms = [
        statistics.median(by_identity[arm.config_sha256])
        if arm.config_sha256 in by_identity
        else speed * _count_grids(arm.training_config)
        for arm in arms
    ]
    return sum(of_arms) / max(1, num_workers)


def _count_grids(config: TrainingConfig) -> int:
    """How many grids a job of this configuration trains on, over all epochs."""
    num_samples = config.num_samples or DEFAULT_NUM_SAMPLES  # data of users have any number
    return max(1, config.epochs * num_samples)
