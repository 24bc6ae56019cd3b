"""The epochs of many jobs, as judging and drawing need them.

A hundred jobs of five hundred epochs are fifty thousand rows. Made into whole `EpochMetrics`, they
take seconds; read as plain values of the columns that are needed, a fraction of one.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol

from sqlalchemy import String, cast, select
from sqlmodel import Session

from server.models import EpochMetrics


class JudgedEpoch(Protocol):
    """What a verdict and a curve ask of an epoch; `EpochMetrics` has all of it."""

    @property
    def epoch(self) -> int: ...
    @property
    def beta(self) -> float: ...
    @property
    def max_spike_ratio(self) -> float | None: ...
    @property
    def train_loss(self) -> float: ...
    @property
    def train_recon_loss(self) -> float: ...
    @property
    def train_kl_loss(self) -> float: ...
    @property
    def train_pixel_accuracy(self) -> float: ...
    @property
    def val_foreground_recall(self) -> float | None: ...
    @property
    def val_foreground_iou(self) -> float | None: ...
    @property
    def val_all_black_share(self) -> float: ...
    @property
    def val_kl_per_dimension(self) -> Sequence[float]: ...


@dataclass
class EpochSummary:
    """An epoch without what only its own page shows."""

    epoch: int
    beta: float
    max_spike_ratio: float | None
    train_loss: float
    train_recon_loss: float
    train_kl_loss: float
    train_pixel_accuracy: float
    val_foreground_recall: float | None
    val_foreground_iou: float | None
    val_all_black_share: float
    val_kl_per_dimension: Sequence[float]


_table = EpochMetrics.__table__  # type: ignore[attr-defined]
_COLUMNS = [_table.c[field.name] for field in fields(EpochSummary)[:-1]]


def read_histories(session: Session, job_ids: Sequence[str]) -> dict[str, list[EpochSummary]]:
    """The epochs of several jobs, oldest first, in one query."""
    rows = (
        select(_table.c.job_id, *_COLUMNS, cast(_table.c.val_kl_per_dimension, String))
        .where(_table.c.job_id.in_(job_ids))
        .order_by(_table.c.job_id, _table.c.epoch)
    )
    histories: dict[str, list[EpochSummary]] = {job_id: [] for job_id in job_ids}
    with _without_collector():
        found = session.connection().execute(rows).all()
        # One long text is decoded many times as fast as its parts.
        decoded = json.loads(f"[{','.join(row[-1] for row in found)}]")
        for (job_id, *values), kl_per_dimension in zip(found, decoded, strict=True):
            values[-1] = kl_per_dimension
            histories[job_id].append(EpochSummary(*values))
    return histories


@contextmanager
def _without_collector() -> Iterator[None]:
    """Half of the time would go to looking for garbage among rows that are all in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
