"""The epochs of jobs, oldest first: as whole rows, or faster as the values of verdicts and curves.

A hundred jobs with five hundred epochs each are fifty thousand rows. Loading them as `EpochMetrics`
takes seconds; reading plain values of only the needed columns takes a fraction of a second.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pydantic_core import from_json
from sqlalchemy import String, cast, select
from sqlmodel import Session, col

from server.models.tables import EpochMetrics


class EpochSummary(NamedTuple):
    """The columns of `EpochMetrics` that verdicts and curves use.

    A criterion that needs another column adds it here, before the KL, which is read as text.
    """

    epoch: int
    beta: float
    max_spike_ratio: float | None
    train_loss: float
    train_recon_loss: float
    train_kl_loss: float
    train_pixel_accuracy: float
    val_recon_loss: float
    val_foreground_recall: float | None
    val_foreground_iou: float | None
    val_background_share: float
    val_all_black_share: float
    val_foreground_share: float | None
    val_foreground_precision: float | None
    val_foreground_ap: float | None
    val_colour_ap: float | None
    val_colour_prevalence: float | None
    val_matched_recall: float | None
    val_matched_iou: float | None
    val_mutual_information: float | None
    val_active_units_variance: int | None
    val_kl_per_dimension: list[float]


History = Sequence[EpochSummary | EpochMetrics]


def read_epochs(session: Session, job_id: str) -> list[EpochMetrics]:
    """A job's epochs with all metrics, oldest first."""
    rows = select(EpochMetrics).where(col(EpochMetrics.job_id) == job_id)
    return list(session.scalars(rows.order_by(col(EpochMetrics.epoch))))


def read_histories(session: Session, job_ids: Iterable[str]) -> dict[str, list[EpochSummary]]:
    """The epochs of several jobs, oldest first, in one query."""
    histories: dict[str, list[EpochSummary]] = {job_id: [] for job_id in job_ids}
    # Columns of the table and not of the model: rows without objects come a fifth faster.
    table = EpochMetrics.__table__.columns  # type: ignore[attr-defined]
    columns = [table[name] for name in EpochSummary._fields[:-1]]
    kl_per_dimension = cast(table.val_kl_per_dimension, String)
    rows = select(table.job_id, *columns, kl_per_dimension).where(table.job_id.in_(histories))
    with _without_garbage_collection():
        # In the order of the primary key, so that nothing has to be sorted.
        found = session.execute(rows.order_by(table.job_id, table.epoch)).all()
        # Decoding one long text is many times faster than decoding its parts.
        decoded = from_json(f"[{','.join(row[-1] for row in found)}]")
        for row, kl in zip(found, decoded, strict=True):
            histories[row[0]].append(EpochSummary._make((*row[1:-1], kl)))
    return histories


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Garbage collection would take half of the time, although all rows are in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
