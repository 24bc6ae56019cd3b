"""The curves and strips of a study: each metric of all arms in one drawing."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from pydantic_core import from_json
from sqlalchemy import String, cast, select
from sqlmodel import Session, col

from server.dashboard.curves import Values
from server.dashboard.drawings import (
    Curves,
    Strip,
    Target,
    draw_curves,
    draw_strip,
    draw_strip_axis,
)
from server.dashboard.scales import Scale, make_linear_scale, make_log_scale, make_share_scale
from server.judging.criteria import Thresholds
from server.judging.groups import GroupMetric
from server.judging.numbers import format_number
from server.judging.studies import ArmVerdict
from server.models.tables import EpochMetrics

#: Points of one drawing, all seeds together; of longer trainings not every epoch is drawn.
MAX_POINTS: Final = 20_000
#: Arms whose last medians are told to those who do not see the drawing.
_MAX_ARMS_TOLD: Final = 8
#: Of the highest losses, so many lie above the axis: one that diverged would flatten the others.
_SHARE_CUT: Final = 0.02

_MakeScale = Callable[[Values], Scale]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing with its title, and what its band or dashed line means."""

    name: str
    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class StripTable:
    """The strips of one metric, a row per arm, over one axis."""

    name: str
    title: str
    note: str
    rows: list[Markup]
    axis: Markup


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    note: str
    make_scale: _MakeScale
    target: Callable[[Thresholds], Target] = lambda _: Target()


def draw_study_curves(
    session: Session, arms: Sequence[ArmVerdict], *, thresholds: Thresholds
) -> list[Drawing]:
    """The metrics of `_PANELS` by epoch."""
    curves = read_curves(session, arms)
    num_epochs = max(int(arm.config["epochs"]) for arm in arms)
    return [
        Drawing(
            name,
            panel.title,
            panel.note,
            draw_curves(
                curves[name],
                scale=panel.make_scale(_join(curves[name])),
                num_epochs=num_epochs,
                label=_describe_curves(panel.title, curves[name], arms),
                target=panel.target(thresholds),
            ),
        )
        for name, panel in _PANELS.items()
    ]


def read_curves(session: Session, arms: Sequence[ArmVerdict]) -> dict[str, list[Curves]]:
    """The curves of each metric, in one query; arms without an epoch have none."""
    places = {
        job_id: (number, seed)
        for number, arm in enumerate(arms)
        for seed, job_id in enumerate(arm.jobs)
        if job_id is not None
    }
    rows = _read_rows(session, list(places), epochs=_choose_epochs(arms))
    by_arm: list[list[Sequence[Any]]] = [[] for _ in arms]
    for job_id, *values in rows:
        number, seed = places[job_id]
        by_arm[number].append((seed, *values))
    tables = [(number, np.array(found, float)) for number, found in enumerate(by_arm) if found]
    return {
        name: [
            _make_curves(number, table, column=column, num_seeds=len(arms[number].jobs))
            for number, table in tables
        ]
        for column, name in enumerate(_PANELS, 2)
    }


def draw_strips(arms: Sequence[ArmVerdict], *, thresholds: Thresholds) -> list[StripTable]:
    """The values of the final epoch of each judged seed."""
    tables = []
    for metric, panel in _STRIPS.items():
        values = [each for arm in arms for each in arm.metrics[metric].values]
        scale = panel.make_scale(np.array([each for each in values if each is not None]))
        rows = [
            draw_strip(
                _make_strip(arm, metric),
                arm=number,
                scale=scale,
                name=f"{panel.title} of {arm.arm}",
                target=panel.target(thresholds),
            )
            for number, arm in enumerate(arms)
        ]
        tables.append(StripTable(metric, panel.title, panel.note, rows, draw_strip_axis(scale)))
    return tables


def _choose_epochs(arms: Sequence[ArmVerdict]) -> list[int] | None:
    """The epochs to draw; None for all of them."""
    total = sum(len(arm.jobs) * int(arm.config["epochs"]) for arm in arms)
    step = math.ceil(total / MAX_POINTS)
    if step <= 1:
        return None
    last = {int(arm.config["epochs"]) for arm in arms}
    return sorted({1, *last, *range(step, max(last), step)})


def _read_rows(
    session: Session, job_ids: Sequence[str], *, epochs: Sequence[int] | None
) -> list[tuple[Any, ...]]:
    """Job, epoch, and the metrics in the order of `_PANELS`."""
    job_id, epoch = col(EpochMetrics.job_id), col(EpochMetrics.epoch)
    query = select(
        job_id,
        epoch,
        col(EpochMetrics.train_loss),
        col(EpochMetrics.train_pixel_accuracy),
        col(EpochMetrics.val_foreground_iou),
        cast(col(EpochMetrics.val_kl_per_dimension), String),
    ).where(job_id.in_(job_ids))
    if epochs is not None:
        query = query.where(epoch.in_(epochs))
    found = session.execute(query).all()
    # Decoding one long text is many times faster than decoding its parts.
    kl = from_json(f"[{','.join(row[-1] for row in found)}]")
    return [(*row[:-1], min(each)) for row, each in zip(found, kl, strict=True)]


def _make_curves(arm: int, table: Values, *, column: int, num_seeds: int) -> Curves:
    """One column of an arm's rows, which are seed, epoch and metrics."""
    epochs, places = np.unique(table[:, 1].astype(np.int64), return_inverse=True)
    seeds = np.full((num_seeds, len(epochs)), np.nan)
    seeds[table[:, 0].astype(np.int64), places] = table[:, column]
    seeds[~np.isfinite(seeds)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an epoch without a finite value
        median = np.nanmedian(seeds, axis=0)
    return Curves(arm, epochs, seeds, median)


def _join(curves: Sequence[Curves]) -> Values:
    if not curves:
        return np.empty(0)
    values: Values = np.concatenate([each.seeds.ravel() for each in curves])
    return values[np.isfinite(values)]


def _describe_curves(title: str, curves: Sequence[Curves], arms: Sequence[ArmVerdict]) -> str:
    """`Training loss by epoch; last medians: a 0.0321, b 0.112`."""
    last = [(arms[each.arm].arm, each.median[np.isfinite(each.median)][-1:]) for each in curves]
    told = [f"{arm} {format_number(float(end[0]))}" for arm, end in last if len(end)]
    if not told:
        return f"{title} by epoch; no epoch has ended yet"
    more = f" and {len(told) - _MAX_ARMS_TOLD} more" * (len(told) > _MAX_ARMS_TOLD)
    return f"{title} by epoch; last medians: {', '.join(told[:_MAX_ARMS_TOLD])}{more}"


def _make_strip(arm: ArmVerdict, metric: GroupMetric) -> Strip:
    summary = arm.metrics[metric]
    rows = list(zip(arm.seeds, summary.values, strict=True))
    return Strip(
        values=summary.values,
        labels=[f"seed {seed.seed}: {format_number(value)}" for seed, value in rows],
        has_passed=[bool(seed.has_passed) for seed in arm.seeds],
        median=summary.median,
    )


def _scale_loss(values: Values) -> Scale:
    if not len(values):
        return make_linear_scale(0, 1)
    return make_linear_scale(0, float(np.quantile(values, 1 - _SHARE_CUT)))


def _scale_iou(values: Values) -> Scale:
    return make_linear_scale(0, max(0.1, float(values.max(initial=0.0))))


def _scale_kl(values: Values) -> Scale:
    return make_log_scale(max(1.0, float(values.max(initial=0.0))))


def _scale_share(_values: Values) -> Scale:
    return make_share_scale()


def _target_accuracy(limits: Thresholds) -> Target:
    return Target(band=(limits.min_accuracy, limits.max_accuracy))


def _target_kl(limits: Thresholds) -> Target:
    return Target(limit=limits.min_kl_per_dimension)


_ACCURACY = _Panel("Training pixel accuracy", "band: target", _scale_share, _target_accuracy)
_IOU = _Panel("Validation foreground IoU", "higher is better", _scale_iou)
_KL = _Panel(
    "Validation KL, weakest dimension",
    "nats; dashed: collapse threshold",
    _scale_kl,
    _target_kl,
)
#: In the order of the columns of `_read_rows`.
_PANELS: Final = {
    "train_loss": _Panel("Training loss", "as trained, with the current β", _scale_loss),
    "train_pixel_accuracy": _ACCURACY,
    "val_foreground_iou": _IOU,
    "min_kl": _KL,
}
_STRIPS: Final = {
    GroupMetric.val_foreground_iou: _IOU,
    GroupMetric.train_pixel_accuracy: _ACCURACY,
    GroupMetric.min_kl_per_dimension: _KL,
}
