"""A comparison's curves as a picture."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from server.fonts import make_drawable, prepare_matplotlib
from server.judging.comparisons import ComparedJob, Comparison
from server.judging.criteria import CriterionName, list_criteria
from server.judging.groups import Side
from server.judging.histories import EpochSummary
from server.judging.knowledge import Chance, is_measured
from server.judging.thinning import find_num_points, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase, SubFigure

MAX_LEGEND_ENTRIES: Final = 12
MAX_LEGEND_CHARACTERS: Final = 40
_TARGET_LABEL, _BACKGROUND_LABEL = "target", "all background"
# Okabe and Ito's colours, which colour-blind readers can distinguish, and a marker for each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY: Final = "#555555"
_ROW_HEIGHT: Final = 4.5


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """The curves of one metric; `find_levels` gives the values that it is compared with."""

    title: str
    read: Callable[[EpochSummary], float | None]
    find_levels: Callable[[Chance], Sequence[float]] = lambda _: ()
    level_label: str = ""
    is_sparse: bool = False  #: read at some epochs only, between which its curve goes on

    def list_points(self, epochs: Iterable[EpochSummary]) -> list[tuple[int, float]]:
        """Epoch and value of each point. What was not measured, is no number, or endless, leaves a
        gap in its curve."""
        points = [(row.epoch, self.read(row)) for row in epochs]
        return [
            (epoch, math.nan if value is None or not math.isfinite(value) else value)
            for epoch, value in points
            if not (self.is_sparse and value is None)
        ]


LOSS: Final = Panel("training loss", lambda row: row.train_loss)
ACCURACY: Final = Panel("training pixel accuracy", lambda row: row.train_pixel_accuracy)
_KL: Final = Panel(
    "validation KL, all dimensions (nats)", lambda row: row.val_kl_total, is_sparse=True
)
#: The rows of a picture, each with its heading.
_ROWS: Final[dict[str, Sequence[Panel]]] = {
    f"training, and {Side.paints}": (
        LOSS,
        ACCURACY,
        Panel("validation foreground IoU", lambda row: row.val_foreground_iou),
        Panel(
            "painted share of the cells",
            lambda row: 1 - row.val_background_share,
            lambda chance: chance.foreground,
            "true share",
        ),
    ),
    Side.knows: (
        Panel(
            "foreground average precision",
            lambda row: row.val_foreground_ap,
            lambda chance: chance.foreground,
            "random scores",
        ),
        Panel(
            "colour average precision",
            lambda row: row.val_colour_ap,
            lambda chance: chance.colour,
            "random scores",
        ),
        Panel("mutual information (nats)", lambda row: row.val_mutual_information),
        _KL,
    ),
}
#: Of jobs that are older than the measures.
_OLD_ROWS: Final[dict[str, Sequence[Panel]]] = {"": (LOSS, ACCURACY, _KL)}


def list_rows(*, has_measures: bool) -> dict[str, Sequence[Panel]]:
    """The panels of each row of a picture by its heading."""
    return _ROWS if has_measures else _OLD_ROWS


def find_width(rows: dict[str, Sequence[Panel]]) -> float:
    """The width of a picture in inches."""
    return 15.0 if max(map(len, rows.values())) <= 3 else 18.0


def render_curves(comparison: Comparison) -> bytes:
    """What the jobs paint and what they know by epoch, as a PNG: a row each, with the accuracy's
    target band and the levels of models that know nothing."""
    # Imported here: matplotlib takes half a second, which the server's start should not wait for.
    from matplotlib.figure import Figure  # noqa: PLC0415

    histories = [entry.epochs for entry in comparison.entries]
    # Jobs without an epoch tell nothing about the measures.
    has_measures = any(epochs and is_measured(epochs) for epochs in histories)
    rows = list_rows(has_measures=has_measures)
    size = find_width(rows), _ROW_HEIGHT * len(rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    chance = Chance.of_runs(histories)
    for part, (heading, panels) in zip(split_rows(figure, rows), rows.items(), strict=True):
        drawn = dict(zip(panels, part.subplots(1, len(panels)), strict=True))
        for panel, axes in drawn.items():
            _draw_panel(axes, panel, comparison)
            mark_levels(axes, panel, chance)
        if heading:
            part.suptitle(heading, fontweight="bold")
        if ACCURACY in drawn:
            _mark_targets(drawn[ACCURACY], comparison)
        if LOSS in drawn and len(comparison.entries) <= MAX_LEGEND_ENTRIES:
            drawn[LOSS].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def split_rows(figure: "FigureBase", rows: dict[str, Sequence[Panel]]) -> "list[SubFigure]":
    """A part of the picture for each row."""
    return list(figure.subfigures(len(rows), 1, squeeze=False)[:, 0])


def mark_levels(axes: "Axes", panel: Panel, chance: Chance) -> None:
    """The values that a panel's curves are compared with, as dashed lines."""
    levels = panel.find_levels(chance)
    for place, level in enumerate(levels):
        # A label with an underscore in front is left out of the legend.
        label = "_" * bool(place) + panel.level_label
        axes.axhline(level, color=_GREY, linestyle="--", linewidth=1, label=label)
    if levels:
        axes.set_ylim(bottom=0)
        line = next(line for line in axes.get_lines() if line.get_label() == panel.level_label)
        axes.legend([line], [panel.level_label], fontsize=8, loc="best")


def draw_name(name: str) -> str:
    """A name for a picture: a long one without its middle, in letters that a font has."""
    shown = make_drawable(shorten_label(name))
    prepare_matplotlib(shown)
    # matplotlib reads `$` as a formula and hides a label that begins with an underscore.
    return "\N{ZERO WIDTH SPACE}" + shown.replace("$", r"\$")


def shorten_label(label: str) -> str:
    """The label for a legend; a long one without its middle."""
    if len(label) <= MAX_LEGEND_CHARACTERS:
        return label
    side = MAX_LEGEND_CHARACTERS // 2
    return f"{label[:side]}…{label[-side:]}"


def _draw_panel(axes: "Axes", panel: Panel, comparison: Comparison) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow to import

    limit = find_num_points(len(comparison.entries))
    for index, entry in enumerate(comparison.entries):
        _draw_entry(axes, entry, index=index, panel=panel, limit=limit)
    axes.set_title(panel.title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _draw_entry(axes: "Axes", entry: ComparedJob, *, index: int, panel: Panel, limit: int) -> None:
    points = np.array(panel.list_points(entry.epochs), dtype=np.float64).reshape(-1, 2)
    points = points[thin(points[:, 1], limit=limit)]
    axes.plot(
        points[:, 0],
        points[:, 1],
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)] if len(points) <= 50 else None,
        markersize=4,
        linewidth=1.5,
        label=draw_name(entry.label),
    )


def _mark_targets(axes: "Axes", comparison: Comparison) -> None:
    limits = comparison.thresholds
    if CriterionName.accuracy_in_range in list_criteria(comparison.criteria_set):
        band = (limits.min_accuracy, limits.max_accuracy)
        axes.axhspan(*band, color="#009E73", alpha=0.12, label=_TARGET_LABEL)
    for share in comparison.background_shares:
        axes.axhline(share, color=_GREY, linestyle="--", linewidth=1, label=_BACKGROUND_LABEL)
    handles, labels = axes.get_legend_handles_labels()
    marks = {
        label: handle
        for handle, label in zip(handles, labels, strict=True)
        if label in (_TARGET_LABEL, _BACKGROUND_LABEL)
    }
    if marks:
        axes.legend(marks.values(), marks.keys(), fontsize=8, loc="lower right")
