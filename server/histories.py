"""The epochs of many jobs, as judging and drawing need them.

A hundred jobs of five hundred epochs are fifty thousand rows. Made into whole `EpochMetrics`, they
take seconds; read as plain values of the columns that are needed, a fraction of one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

from sqlalchemy import String, cast
from sqlmodel import Session, col, select

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
    """An epoch without what only its own page shows. The KL is decoded when it is asked for."""

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
    encoded_kl: str

    @cached_property
    def val_kl_per_dimension(self) -> Sequence[float]:
        decoded: list[float] = json.loads(self.encoded_kl)
        return decoded


_COLUMNS = [
    EpochMetrics.__table__.c[field.name]  # type: ignore[attr-defined]
    for field in fields(EpochSummary)
    if field.name != "encoded_kl"
]


def read_histories(session: Session, job_ids: Sequence[str]) -> dict[str, list[EpochSummary]]:
    """The epochs of several jobs, oldest first, in one query."""
    histories: dict[str, list[EpochSummary]] = {job_id: [] for job_id in job_ids}
    kl = cast(col(EpochMetrics.val_kl_per_dimension), String)
    rows = select(col(EpochMetrics.job_id), *_COLUMNS, kl)  # type: ignore[call-overload]
    rows = rows.where(col(EpochMetrics.job_id).in_(job_ids))
    rows = rows.order_by(col(EpochMetrics.job_id), col(EpochMetrics.epoch))
    for job_id, *values in session.execute(rows):
        histories[job_id].append(EpochSummary(*values))
    return histories
