"""The curves and strips of a study: each metric of all arms in one drawing."""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from sqlalchemy import select
from sqlmodel import Session, col

from server.dashboard.drawings import (
    NO_TARGET,
    Curves,
    Strip,
    Target,
    draw_curves,
    draw_strip,
    draw_strip_axis,
)
from server.dashboard.scales import Scale, make_linear_scale, make_log_scale, make_share_scale
from server.judging.criteria import CriterionName, Thresholds
from server.judging.groups import GroupMetric, Side
from server.judging.histories import read_kl
from server.judging.knowledge import Chance, find_levels
from server.judging.numbers import format_number
from server.judging.studies import ArmVerdict
from server.judging.thinning import Values
from server.models.configuration import read_config
from server.models.epochs import EpochMetrics

#: Points of one drawing, all seeds together; of longer trainings not every epoch is drawn.
MAX_POINTS: Final = 10_000
#: Arms whose last medians are told to those who do not see the drawing.
_MAX_ARMS_TOLD: Final = 8
#: Of the highest losses, so many lie above the axis: one that diverged would flatten the others.
_SHARE_CUT: Final = 0.02

_MakeScale = Callable[[Values], Scale]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing with its title, and what its band or dashed lines mean."""

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
class StudyCurves:
    """The curves of each metric; arms without an epoch have none.

    A metric that no epoch has is left out once there is an epoch: the jobs are older than it.
    """

    by_metric: dict[str, list[Curves]]
    chance: Chance

    @property
    def is_measured(self) -> bool:
        return not self.by_metric.keys().isdisjoint(_MEASURES)


@dataclass(frozen=True, slots=True)
class Standard:
    """What values are compared with: the thresholds of the criteria that judge, and chance."""

    thresholds: Thresholds
    criteria: Collection[CriterionName]
    chance: Chance


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    note: str
    make_scale: _MakeScale
    target: Callable[[Standard], Target] = lambda _: NO_TARGET
    target_note: str = ""

    def describe(self, target: Target) -> str:
        """The note, and what the target means if there is one."""
        notes = [self.note, self.target_note if target != NO_TARGET else ""]
        return "; ".join(filter(None, notes))


def draw_study_curves(
    curves: StudyCurves, arms: Sequence[ArmVerdict], *, standard: Standard
) -> dict[str, list[Drawing]]:
    """The metrics of `_PANELS` by epoch, in their groups."""
    return {
        group: [
            _draw_panel(name, panel, curves.by_metric[name], arms, standard=standard)
            for name, panel in panels.items()
            if name in curves.by_metric
        ]
        for group, panels in _PANELS.items()
    }


def _draw_panel(
    name: str,
    panel: _Panel,
    curves: Sequence[Curves],
    arms: Sequence[ArmVerdict],
    *,
    standard: Standard,
) -> Drawing:
    target = panel.target(standard)
    svg = draw_curves(
        curves,
        scale=panel.make_scale(np.append(_join(curves), target.limits)),
        num_epochs=max(read_config(arm.config).epochs for arm in arms),
        label=_describe_curves(panel.title, curves, arms),
        target=target,
    )
    return Drawing(name, panel.title, panel.describe(target), svg)


def read_curves(session: Session, arms: Sequence[ArmVerdict]) -> StudyCurves:
    """The curves of all metrics, in one query."""
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
    by_metric = {
        name: [
            _make_curves(number, table, column=column, num_seeds=len(arms[number].jobs))
            for number, table in tables
            if np.isfinite(table[:, column]).any()
        ]
        for column, name in enumerate(_COLUMNS, 2)
    }
    shares = (find_levels({row[-place] for row in rows}) for place in (2, 1))
    return StudyCurves(
        {name: curves for name, curves in by_metric.items() if curves or not rows},
        Chance(*shares),
    )


def draw_strips(arms: Sequence[ArmVerdict], *, standard: Standard) -> list[StripTable]:
    """The values of the final epoch of each judged seed; metrics that no seed has are left out once
    a seed is judged."""
    has_judged = any(arm.num_judged for arm in arms)
    tables = []
    for metric, panel in _STRIPS.items():
        values = [each for arm in arms for each in arm.metrics[metric].values]
        if has_judged and not any(each is not None for each in values):
            continue
        target = panel.target(standard)
        scale = panel.make_scale(np.array([each for each in values if each is not None]))
        rows = [
            draw_strip(
                _make_strip(arm, metric),
                arm=number,
                scale=scale,
                name=f"{panel.title} of {arm.arm}",
                target=target,
            )
            for number, arm in enumerate(arms)
        ]
        note, axis = panel.describe(target), draw_strip_axis(scale)
        tables.append(StripTable(metric, panel.title, note, rows, axis))
    return tables


def _choose_epochs(arms: Sequence[ArmVerdict]) -> list[int] | None:
    """The epochs to draw; None for all of them."""
    total = sum(len(arm.jobs) * read_config(arm.config).epochs for arm in arms)
    step = math.ceil(total / MAX_POINTS)
    if step <= 1:
        return None
    last = {read_config(arm.config).epochs for arm in arms}
    return sorted({1, *last, *range(step, max(last), step)})


def _read_rows(
    session: Session, job_ids: Sequence[str], *, epochs: Sequence[int] | None
) -> list[tuple[Any, ...]]:
    """Job, epoch, the metrics in the order of `_COLUMNS`, and the two levels of chance."""
    job_id, epoch = col(EpochMetrics.job_id), col(EpochMetrics.epoch)
    query = select(
        job_id,
        epoch,
        col(EpochMetrics.train_loss),
        col(EpochMetrics.train_pixel_accuracy),
        col(EpochMetrics.val_foreground_iou),
        1 - col(EpochMetrics.val_background_share),
        col(EpochMetrics.val_foreground_ap),
        col(EpochMetrics.val_colour_ap),
        col(EpochMetrics.val_mutual_information),
        col(EpochMetrics.val_foreground_share),
        col(EpochMetrics.val_colour_prevalence),
    ).where(job_id.in_(job_ids))
    if epochs is not None:
        query = query.where(epoch.in_(epochs))
    return [(*row[:-2], kl.min, *row[-2:]) for row, kl in read_kl(session, query)]


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


def _scale_small(values: Values) -> Scale:
    """For shares that are mostly far below 1."""
    return make_linear_scale(0, max(0.1, float(values.max(initial=0.0))))


def _scale_nats(values: Values) -> Scale:
    return make_linear_scale(0, max(1.0, float(values.max(initial=0.0))))


def _scale_kl(values: Values) -> Scale:
    return make_log_scale(max(1.0, float(values.max(initial=0.0))))


def _scale_share(_values: Values) -> Scale:
    return make_share_scale()


def _target_accuracy(standard: Standard) -> Target:
    if CriterionName.accuracy_in_range not in standard.criteria:
        return NO_TARGET
    return Target(band=(standard.thresholds.min_accuracy, standard.thresholds.max_accuracy))


def _target_kl(standard: Standard) -> Target:
    if CriterionName.kl_per_dimension not in standard.criteria:
        return NO_TARGET
    return Target(limits=(standard.thresholds.min_kl_per_dimension,))


def _compare_foreground(standard: Standard) -> Target:
    return Target(limits=standard.chance.foreground)


def _compare_colour(standard: Standard) -> Target:
    return Target(limits=standard.chance.colour)


_ACCURACY = _Panel("Training pixel accuracy", "", _scale_share, _target_accuracy, "band: target")
_IOU = _Panel("Validation foreground IoU", "higher is better", _scale_small)
_KL = _Panel(
    "Validation KL, weakest dimension",
    "nats",
    _scale_kl,
    _target_kl,
    "dashed: collapse threshold",
)
_FOREGROUND_AP = _Panel(
    "Foreground average precision",
    "validation",
    _scale_small,
    _compare_foreground,
    "dashed: random scores",
)
_COLOUR_AP = _Panel(
    "Colour average precision",
    "validation",
    _scale_small,
    _compare_colour,
    "dashed: random scores",
)
_INFORMATION = _Panel("Mutual information of grid and latent", "nats", _scale_nats)
_PANELS: Final[dict[str, dict[str, _Panel]]] = {
    "training": {
        "train_loss": _Panel("Training loss", "as trained, with the current β", _scale_loss),
        "min_kl": _KL,
    },
    Side.paints: {
        "train_pixel_accuracy": _ACCURACY,
        "val_foreground_iou": _IOU,
        "painted_share": _Panel(
            "Painted share of the cells",
            "validation",
            _scale_small,
            _compare_foreground,
            "dashed: the true share",
        ),
    },
    Side.knows: {
        "val_foreground_ap": _FOREGROUND_AP,
        "val_colour_ap": _COLOUR_AP,
        "val_mutual_information": _INFORMATION,
    },
}
#: In the order of `_read_rows`.
_COLUMNS: Final = (
    "train_loss",
    "train_pixel_accuracy",
    "val_foreground_iou",
    "painted_share",
    "val_foreground_ap",
    "val_colour_ap",
    "val_mutual_information",
    "min_kl",
)
_MEASURES: Final = _PANELS[Side.knows].keys()
_STRIPS: Final = {
    GroupMetric.val_foreground_iou: _IOU,
    GroupMetric.train_pixel_accuracy: _ACCURACY,
    GroupMetric.min_kl_per_dimension: _KL,
    GroupMetric.val_foreground_ap: _FOREGROUND_AP,
    GroupMetric.val_colour_ap: _COLOUR_AP,
    GroupMetric.val_mutual_information: _INFORMATION,
}
