"""A study's curves as a picture: every seed, the median of each arm, and its final values."""

import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from server.judging.charts import (
    ACCURACY,
    LOSS,
    Panel,
    draw_name,
    find_width,
    list_rows,
    mark_levels,
    split_rows,
)
from server.judging.criteria import CriterionName
from server.judging.groups import GroupMetric, SeedResult
from server.judging.histories import EpochSummary
from server.judging.knowledge import Chance, is_measured
from server.judging.study_reports import StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

# Okabe and Ito's colours, which colour-blind readers can distinguish, by the style of the line.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_STYLES: Final = ("-", "--", ":")
_GREY: Final = "#555555"
#: A loss that falls by more than this factor, or differs so much between arms, is shown by its
#: logarithm.
_LARGE_FACTOR: Final = 30.0
_PANEL_HEIGHT: Final = 4.2
_DPI: Final = 100
#: Of all seeds together: a picture shows no more.
MAX_DRAWN_EPOCHS: Final = 50_000

Histories = Mapping[str, Sequence[EpochSummary]]

_STRIPS: Final[dict[GroupMetric, str]] = {
    GroupMetric.val_foreground_iou: "validation foreground IoU",
    GroupMetric.train_pixel_accuracy: "training pixel accuracy",
    GroupMetric.min_kl_per_dimension: "KL of the weakest dimension (nats)",
    GroupMetric.val_foreground_ap: "foreground average precision",
    GroupMetric.val_colour_ap: "colour average precision",
    GroupMetric.val_mutual_information: "mutual information (nats)",
}
#: What jobs of every age have.
_ALWAYS: Final = tuple(_STRIPS)[:3]


@dataclass(frozen=True, slots=True)
class _ArmLook:
    """How an arm is drawn: its place, its name, and its seeds."""

    index: int
    name: str
    results: Sequence[SeedResult]

    @property
    def colour(self) -> str:
        return _COLOURS[self.index % len(_COLOURS)]

    @property
    def style(self) -> str:
        return _STYLES[self.index // len(_COLOURS) % len(_STYLES)]


def render_study_curves(report: StudyReport, histories: Histories) -> bytes:
    """What the arms paint and what they know by epoch, and each seed's final values, as a PNG."""
    # Imported here: matplotlib takes half a second, which the server's start should not wait for.
    from matplotlib.figure import Figure  # noqa: PLC0415

    arms = [
        _ArmLook(index, draw_name(arm.arm), results)
        for index, (arm, results) in enumerate(
            zip(report.verdict.arms, report.verdict.results, strict=True)
        )
    ]
    # Jobs without an epoch tell nothing about the measures.
    has_measures = any(epochs and is_measured(epochs) for epochs in histories.values())
    rows = list_rows(has_measures=has_measures)
    strip_height = 1.3 + 0.32 * max(2, len(arms))
    heights = [_PANEL_HEIGHT * len(rows), strip_height]
    figure = Figure(figsize=(find_width(rows), sum(heights)), dpi=_DPI, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (heading, panels) in zip(split_rows(top, rows), rows.items(), strict=True):
        _draw_curves(part, arms, panels=panels, report=report, histories=histories)
        if heading:
            part.suptitle(heading, fontweight="bold")
    _draw_strips(bottom, arms, report=report, chance=Chance.of_runs(histories.values()))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# -- curves


def _draw_curves(
    figure: "FigureBase",
    arms: Sequence[_ArmLook],
    *,
    panels: Sequence[Panel],
    report: StudyReport,
    histories: Histories,
) -> None:
    chance = Chance.of_runs(histories.values())
    drawn = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    for panel, axes in drawn.items():
        medians = [_draw_arm(axes, arm, histories, panel) for arm in arms]
        if panel is LOSS:
            _choose_scale(axes, medians)
        _finish_curves(axes, title=panel.title)
        mark_levels(axes, panel, chance)
    if ACCURACY in drawn:
        drawn[ACCURACY].set_ylim(-0.02, 1.02)
        _mark_targets(drawn[ACCURACY], report=report)


def _draw_arm(axes: "Axes", arm: _ArmLook, histories: Histories, panel: Panel) -> dict[int, float]:
    """Every seed as a thin line, and their median, which is returned, as a thick one."""
    from matplotlib.collections import LineCollection  # noqa: PLC0415 - slow to import

    curves = [
        dict(panel.list_points(histories.get(result.job_id or "", ()))) for result in arm.results
    ]
    # One collection: a thousand lines of their own would take seconds.
    lines = [list(curve.items()) for curve in curves if curve]
    axes.add_collection(LineCollection(lines, colors=arm.colour, linewidths=0.8, alpha=0.35))
    median = _find_median(curves)
    marker = "o" if len(median) == 1 else None
    axes.plot(list(median), list(median.values()), color=arm.colour, linestyle=arm.style,
              linewidth=2.4, marker=marker)  # fmt: skip
    return median


def _find_median(curves: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """The median of each epoch over the seeds that have a value for it."""
    values: dict[int, list[float]] = {}
    for curve in curves:
        for epoch, value in curve.items():
            if math.isfinite(value):
                values.setdefault(epoch, []).append(value)
    return {epoch: statistics.median(values[epoch]) for epoch in sorted(values)}


def _finish_curves(axes: "Axes", *, title: str) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow to import

    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.margins(x=0.03)


def _choose_scale(axes: "Axes", medians: Iterable[Mapping[int, float]]) -> None:
    """By the logarithm if the medians span much, as with class weights and without."""
    values = [value for median in medians for value in median.values()]
    if values and min(values) > 0 and max(values) > _LARGE_FACTOR * min(values):
        axes.set_yscale("log")


def _mark_targets(axes: "Axes", *, report: StudyReport) -> None:
    limits = report.thresholds
    if CriterionName.accuracy_in_range in report.criteria:
        band = (limits.min_accuracy, limits.max_accuracy)
        axes.axhspan(*band, color="#009E73", alpha=0.12, label="target")
    for place, share in enumerate(report.background_shares):
        # A label with an underscore in front is left out of the legend.
        label = "_" * bool(place) + "all background"
        axes.axhline(share, color=_GREY, linestyle="--", linewidth=1, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best")


# -- final values


def _draw_strips(
    figure: "FigureBase", arms: Sequence[_ArmLook], *, report: StudyReport, chance: Chance
) -> None:
    """Metrics that no judged seed has are left out."""
    shown = [each for each in _STRIPS if each in _ALWAYS or each in report.metrics]
    panels: list[Axes] = list(figure.subplots(1, len(shown), sharey=True))
    for axes, metric in zip(panels, shown, strict=True):
        for arm in arms:
            _draw_seeds(axes, arm, metric)
        axes.set_title(_STRIPS[metric], fontsize=12 if len(shown) <= len(_ALWAYS) else 10)
        axes.grid(alpha=0.3, axis="x")
        for level in _find_levels(metric, report=report, chance=chance):
            axes.axvline(level, color=_GREY, linestyle="--", linewidth=1)
    limits = report.thresholds
    if CriterionName.accuracy_in_range in report.criteria:
        accuracy = panels[shown.index(GroupMetric.train_pixel_accuracy)]
        accuracy.axvspan(limits.min_accuracy, limits.max_accuracy, color="#009E73", alpha=0.12)
    _name_arms(panels[0], arms)
    figure.supxlabel("after the last epoch; ● passed, ○ did not; | median", fontsize=9)


def _find_levels(metric: GroupMetric, *, report: StudyReport, chance: Chance) -> Sequence[float]:
    """The values that a metric is compared with."""
    match metric:
        case GroupMetric.min_kl_per_dimension if CriterionName.kl_per_dimension in report.criteria:
            return (report.thresholds.min_kl_per_dimension,)
        case GroupMetric.val_foreground_ap:
            return chance.foreground
        case GroupMetric.val_colour_ap:
            return chance.colour
        case _:
            return ()


def _draw_seeds(axes: "Axes", arm: _ArmLook, metric: GroupMetric) -> None:
    """A point per seed, each a little higher than the one before, and the median."""
    found = [
        (value, result.has_passed)
        for result in arm.results
        if (value := result.metrics.get(metric)) is not None
    ]
    if found:
        heights = [
            arm.index + 0.5 * ((place + 0.5) / len(found) - 0.5) for place in range(len(found))
        ]
        values = [value for value, _ in found]
        faces = [arm.colour if has_passed else "none" for _, has_passed in found]
        axes.scatter(values, heights, s=26, facecolor=faces, edgecolor=arm.colour, linewidth=1.2)
        median = statistics.median(values)
        axes.plot([median] * 2, [arm.index - 0.36, arm.index + 0.36], color=arm.colour, lw=2.4)


def _name_arms(axes: "Axes", arms: Sequence[_ArmLook]) -> None:
    """Names in the arms' colours, the first at the top: they are also the legend of the curves."""
    axes.set_yticks([arm.index for arm in arms], [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_color(arm.colour)
