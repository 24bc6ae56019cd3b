"""A job's course, epoch by epoch, as verdicts and plots need it."""

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import select
from sqlmodel import Session, col

from server.models import EpochMetrics


class CurvePoint(NamedTuple):
    """The columns of EpochMetrics that a verdict rests on. Making whole rows of thousands of
    epochs would take longer than judging them."""

    epoch: int
    beta: float
    max_spike_ratio: float | None
    train_loss: float
    train_recon_loss: float
    train_kl_loss: float
    train_pixel_accuracy: float
    val_foreground_recall: float | None
    val_all_black_share: float
    val_kl_per_dimension: list[float]


def read_curve_points(session: Session, job_ids: Iterable[str]) -> dict[str, list[CurvePoint]]:
    """The curves of several jobs, oldest epoch first, in one query."""
    curves: dict[str, list[CurvePoint]] = {job_id: [] for job_id in job_ids}
    columns = [getattr(EpochMetrics, name) for name in CurvePoint._fields]
    job_id, epoch = col(EpochMetrics.job_id), col(EpochMetrics.epoch)
    rows = select(job_id, *columns).where(job_id.in_(curves))
    # In the order of the primary key, so that nothing is to be sorted.
    for owner, *values in session.execute(rows.order_by(job_id, epoch)):
        curves[owner].append(CurvePoint._make(values))
    return curves
