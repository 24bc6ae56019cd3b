"""A comparison's curves as a picture."""

import io
from typing import TYPE_CHECKING, Final

from server.judging.comparisons import ComparedJob, Comparison
from server.judging.criteria import CriterionName, list_criteria

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LEGEND_ENTRIES: Final = 12
MAX_LEGEND_CHARACTERS: Final = 40
_TARGET_LABEL, _BACKGROUND_LABEL = "target", "all background"
# Okabe and Ito's colours, which colour-blind readers can distinguish, and a marker for each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def render_curves(comparison: Comparison) -> bytes:
    """Loss, training accuracy with its target band and the collapse line, and KL, as a PNG."""
    # Imported here: matplotlib takes half a second, which the server's start should not wait for.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(15, 4.5), dpi=100, layout="constrained")
    loss, accuracy, kl = figure.subplots(1, 3)
    for index, entry in enumerate(comparison.entries):
        _draw_entry((loss, accuracy, kl), entry, index=index)
    loss.set_title("training loss")
    accuracy.set_title("training pixel accuracy")
    kl.set_title("validation KL, all dimensions (nats)")
    _mark_targets(accuracy, comparison)
    for axes in (loss, accuracy, kl):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    if len(comparison.entries) <= MAX_LEGEND_ENTRIES:
        loss.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def shorten_label(label: str) -> str:
    """The label for a legend; a long one without its middle."""
    if len(label) <= MAX_LEGEND_CHARACTERS:
        return label
    side = MAX_LEGEND_CHARACTERS // 2
    return f"{label[:side]}…{label[-side:]}"


def _draw_entry(panels: "tuple[Axes, Axes, Axes]", entry: ComparedJob, *, index: int) -> None:
    epochs = [row.epoch for row in entry.epochs]
    curves = (
        [row.train_loss for row in entry.epochs],
        [row.train_pixel_accuracy for row in entry.epochs],
        [sum(row.val_kl_per_dimension) for row in entry.epochs],
    )
    for axes, values in zip(panels, curves, strict=True):
        axes.plot(
            epochs,
            values,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)] if len(epochs) <= 50 else None,
            markersize=4,
            linewidth=1.5,
            # matplotlib reads `$` as a formula and hides a label that begins with an underscore.
            label="\N{ZERO WIDTH SPACE}" + shorten_label(entry.label).replace("$", r"\$"),
        )


def _mark_targets(axes: "Axes", comparison: Comparison) -> None:
    limits = comparison.thresholds
    if CriterionName.accuracy_in_range in list_criteria(comparison.criteria_set):
        band = (limits.min_accuracy, limits.max_accuracy)
        axes.axhspan(*band, color="#009E73", alpha=0.12, label=_TARGET_LABEL)
    for share in comparison.background_shares:
        axes.axhline(share, color="#555555", linestyle="--", linewidth=1, label=_BACKGROUND_LABEL)
    handles, labels = axes.get_legend_handles_labels()
    marks = {
        label: handle
        for handle, label in zip(handles, labels, strict=True)
        if label in (_TARGET_LABEL, _BACKGROUND_LABEL)
    }
    if marks:
        axes.legend(marks.values(), marks.keys(), fontsize=8, loc="lower right")
