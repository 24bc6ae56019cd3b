"""The epochs of jobs, oldest first: as whole rows, or faster as the values of verdicts and curves.

A hundred jobs with a thousand epochs and 256 dimensions each are a hundred thousand rows with
twenty-five million values of KL. So plain values of only the needed columns are read, and lists
only where they are used: that of the last epoch, by which a job is judged, and for curves as many
as a picture can show, of which a total and a minimum are kept.
"""

import gc
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import ColumnElement, String, cast, func, or_, select
from sqlalchemy import Select as Query
from sqlalchemy.orm import defer
from sqlmodel import Session, col

from server.models.columns import FiniteJSON
from server.models.epochs import EpochMetrics
from server.models.tables import Job

#: Values of KL that are read for the curves of all jobs together. Of longer curves every second,
#: third or n-th epoch is read.
MAX_KL_VALUES: Final = 2_000_000
#: Epochs that are in memory together where each job is judged by itself.
_MAX_EPOCHS_AT_ONCE: Final = 20_000
#: Rows that are taken from the database together: with 256 dimensions some megabyte of text.
_IN_PARTS: Final[Mapping[str, Any]] = {"yield_per": 200}
# Columns of the table and not of the model: rows without objects come a fifth faster.
_TABLE: Final = EpochMetrics.__table__.columns  # type: ignore[attr-defined]
_LISTS: Final = [column.name for column in _TABLE if isinstance(column.type, FiniteJSON)]
_LISTS_OF_NUMBERS: Final = TypeAdapter(list[list[float | None]])
_KL_TEXT: Final = cast(_TABLE.val_kl_per_dimension, String)


class EpochSummary(NamedTuple):
    """The columns of `EpochMetrics` that verdicts and curves use, and the KL of all dimensions.

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
    #: Of the last epoch; earlier ones have none.
    val_kl_per_dimension: Sequence[float] = ()
    #: Nats, of all dimensions together and of the weakest; None for an epoch whose KL was not read.
    val_kl_total: float | None = None
    val_kl_min: float | None = None


History = Sequence[EpochSummary | EpochMetrics]

#: The columns that are read for every epoch.
_NAMES: Final = EpochSummary._fields[: EpochSummary._fields.index("val_kl_per_dimension")]


class KlSummary(NamedTuple):
    """The KL of an epoch in nats: of all dimensions together, and of the weakest one."""

    total: float
    min: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "KlSummary":
        """NaN if a value is no number, or if there is none."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(math.nan, math.nan)
        return cls(sum(known), min(known))


def read_epochs(
    session: Session,
    job_id: str,
    *,
    epochs: Collection[int] | None = None,
    has_lists: bool = True,
) -> list[EpochMetrics]:
    """A job's epochs with all metrics, oldest first: all of them, or some.

    Without `has_lists` their lists are read when they are used, each by a query of its own.
    """
    rows = select(EpochMetrics).where(col(EpochMetrics.job_id) == job_id)
    if epochs is not None:
        rows = rows.where(col(EpochMetrics.epoch).in_(epochs))
    if not has_lists:
        rows = rows.options(*(defer(getattr(EpochMetrics, name)) for name in _LISTS))
    return list(session.scalars(rows.order_by(col(EpochMetrics.epoch))))


def read_epoch_part(session: Session, job_id: str, *, after: int, limit: int) -> list[EpochMetrics]:
    """At most `limit` of the job's epochs behind the epoch `after`, oldest first."""
    rows = select(EpochMetrics).where(
        col(EpochMetrics.job_id) == job_id, col(EpochMetrics.epoch) > after
    )
    return list(session.scalars(rows.order_by(col(EpochMetrics.epoch)).limit(limit)))


def read_histories(
    session: Session,
    job_ids: Iterable[str],
    *,
    has_kl_curves: bool = False,
    max_epochs: int | None = None,
) -> dict[str, list[EpochSummary]]:
    """The epochs of several jobs, oldest first, in a few queries.

    With `has_kl_curves` they have the KL of as many epochs as MAX_KL_VALUES allows. With
    `max_epochs` about as many rows are read, all jobs together: the first and the last epoch of
    each job, and every n-th between them.
    """
    histories: dict[str, list[EpochSummary]] = {job_id: [] for job_id in job_ids}
    step = 1 if max_epochs is None else _find_step(session, histories, max_epochs=max_epochs)
    rows = select(_TABLE.job_id, *(_TABLE[name] for name in _NAMES))
    # In the order of the primary key, so that nothing has to be sorted.
    rows = _select_epochs(rows, histories, step=step).order_by(_TABLE.job_id, _TABLE.epoch)
    with _without_garbage_collection():
        for job_id, *values in session.execute(rows, execution_options=_IN_PARTS):
            histories[job_id].append(EpochSummary._make((*values, (), None, None)))
        _add_last_kl(session, histories)
        if has_kl_curves:
            _add_kl_curves(session, histories, step=step)
    return histories


def read_in_parts(
    session: Session, jobs: Sequence[Job]
) -> Iterator[tuple[Job, list[EpochSummary]]]:
    """Each job with its epochs, with few of them in memory: those of all might fill it."""
    part: list[Job] = []
    num_epochs = 0
    for job in jobs:
        if part and num_epochs + job.epochs_completed > _MAX_EPOCHS_AT_ONCE:
            yield from _read_part(session, part)
            part, num_epochs = [], 0
        part.append(job)
        num_epochs += job.epochs_completed
    yield from _read_part(session, part)


def read_kl(session: Session, rows: Query[*tuple[Any, ...]]) -> Iterator[tuple[Any, KlSummary]]:
    """The rows of a query and the KL of each; a few rows are in memory at a time."""
    found = session.execute(rows.add_columns(_KL_TEXT), execution_options=_IN_PARTS)
    for part in found.partitions():
        for row, values in zip(part, _decode([row[-1] for row in part]), strict=True):
            yield row[:-1], KlSummary.of(values)


def _read_part(session: Session, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[EpochSummary]]]:
    histories = read_histories(session, [job.id for job in jobs]) if jobs else {}
    yield from ((job, histories[job.id]) for job in jobs)


def _select_epochs(
    rows: Query[*tuple[Any, ...]], job_ids: Iterable[str], *, step: int
) -> Query[*tuple[Any, ...]]:
    """The rows of all epochs, or of the first, each `step`-th and the last."""
    of_jobs = _TABLE.job_id.in_(list(job_ids))
    if step == 1:
        return rows.where(of_jobs)
    last = (
        select(_TABLE.job_id, func.max(_TABLE.epoch).label("epoch"))
        .where(of_jobs)
        .group_by(_TABLE.job_id)
        .subquery()
    )
    is_last = _TABLE.epoch == last.c.epoch
    rows = rows.join(last, last.c.job_id == _TABLE.job_id).where(of_jobs)
    return rows.where(or_(is_last, _is_among(step)))


def _is_among(step: int) -> ColumnElement[bool]:
    return or_(_TABLE.epoch == 1, _TABLE.epoch % step == 0)


def _find_step(session: Session, job_ids: Iterable[str], *, max_epochs: int) -> int:
    rows = select(func.count()).where(_TABLE.job_id.in_(list(job_ids)))
    return max(1, math.ceil((session.scalar(rows) or 0) / max_epochs))


def _add_last_kl(session: Session, histories: dict[str, list[EpochSummary]]) -> None:
    """Add the KL of each dimension to the last epoch of each job."""
    last = {job_id: epochs[-1].epoch for job_id, epochs in histories.items() if epochs}
    if not last:
        return
    # Pairs in one condition would make SQLite read the whole table. Most jobs of a comparison have
    # the same last epoch; where they do not, some rows are read for nothing.
    rows = select(_TABLE.job_id, _TABLE.epoch, _KL_TEXT).where(
        _TABLE.job_id.in_(list(last)), _TABLE.epoch.in_(sorted(set(last.values())))
    )
    found = [
        (job_id, text)
        for job_id, epoch, text in session.execute(rows, execution_options=_IN_PARTS)
        if last[job_id] == epoch
    ]
    lists = dict(zip([row[0] for row in found], _decode([row[1] for row in found]), strict=True))
    for job_id in last:
        if job_id not in lists:  # deleted since its epochs were read
            histories[job_id] = []
            continue
        values = lists[job_id]
        epochs, kl = histories[job_id], KlSummary.of(values)
        epochs[-1] = epochs[-1]._replace(
            val_kl_per_dimension=values, val_kl_total=kl.total, val_kl_min=kl.min
        )


def _add_kl_curves(
    session: Session, histories: dict[str, list[EpochSummary]], *, step: int
) -> None:
    """Add the KL to as many of the epochs as may be read; `step` is that of the epochs."""
    num_values = sum(
        len(epochs) * len(epochs[-1].val_kl_per_dimension)
        for epochs in histories.values()
        if epochs
    )
    step *= max(1, math.ceil(num_values / MAX_KL_VALUES))
    rows = select(_TABLE.job_id, _TABLE.epoch).where(_TABLE.job_id.in_(list(histories)))
    known = dict(read_kl(session, rows if step == 1 else rows.where(_is_among(step))))
    for job_id, epochs in histories.items():
        for place, row in enumerate(epochs):
            if kl := known.get((job_id, row.epoch)):
                epochs[place] = row._replace(val_kl_total=kl.total, val_kl_min=kl.min)


def _decode(texts: Sequence[str]) -> list[list[float | None]]:
    """The lists of numbers; one that another version stored and that is none is empty."""
    try:
        # Decoding one long text is many times faster than decoding its parts.
        lists = _LISTS_OF_NUMBERS.validate_json(f"[{','.join(texts)}]", strict=True)
    except ValidationError:
        lists = None
    # An empty text, or one of two lists, leaves another number of them.
    if lists is not None and len(lists) == len(texts):
        return lists
    if len(texts) == 1:
        return [[]]
    half = len(texts) // 2
    return _decode(texts[:half]) + _decode(texts[half:])


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
