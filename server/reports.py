"""A comparison to look at: curves as a picture, and reports in Markdown and HTML that need
nothing from outside."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader

from server.columns import utc_now
from server.criteria import Criterion, CriterionStatus, Thresholds, Verdict
from server.histories import History
from server.models import Job

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from server.schemas import Comparison

MAX_LEGEND_ENTRIES = 12
MAX_LEGEND_CHARACTERS = 40
_MARKS = {
    CriterionStatus.passed: "✓",
    CriterionStatus.failed: "✗",
    CriterionStatus.no_data: "–",
}
# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker beside each.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, slots=True)
class ReportEntry:
    """One compared job with what its report shows."""

    job: Job
    verdict: Verdict
    metrics: History
    has_namesake: bool = False  # another one of the compared jobs has the same name
    reconstruction_png: bytes | None = None
    reconstruction_epoch: int | None = None

    @property
    def title(self) -> str:
        """The job's name if that tells it from the others, else with or as its id."""
        if self.job.name is None:
            return self.job.id
        return f"{self.job.name} ({self.job.id})" if self.has_namesake else self.job.name

    @property
    def label(self) -> str:
        return f"{self.job.option} · {self.title}"

    @property
    def short_label(self) -> str:
        """With the middle of a long name left out, for a legend."""
        if len(self.label) <= MAX_LEGEND_CHARACTERS:
            return self.label
        side = MAX_LEGEND_CHARACTERS // 2
        return f"{self.label[:side]}…{self.label[-side:]}"


def render_curves(entries: Sequence[ReportEntry], *, thresholds: Thresholds) -> bytes:
    """Loss, training accuracy with its target band and the collapse line, and KL, as a PNG."""
    # matplotlib takes half a second to import, and the server shall be ready before that.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(15, 4.5), dpi=100, layout="constrained")
    loss, accuracy, kl = figure.subplots(1, 3)
    for index, entry in enumerate(entries):
        _draw_entry((loss, accuracy, kl), entry, index=index)
    loss.set_title("training loss")
    accuracy.set_title("training pixel accuracy")
    kl.set_title("validation KL, all dimensions (nats)")
    _mark_targets(accuracy, entries, thresholds=thresholds)
    for axes in (loss, accuracy, kl):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    if len(entries) <= MAX_LEGEND_ENTRIES:
        loss.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def render_markdown(entries: Sequence[ReportEntry], comparison: "Comparison") -> str:
    """Recommendation, criteria and differences as Markdown."""
    lines = ["# Comparison", "", escape_markdown(comparison.reason), "", "## Criteria", ""]
    lines += _markdown_table(
        ["criterion", "target", *(_name_in_full(entry) for entry in entries)],
        [
            ["diagnosis", "", *(str(entry.verdict.diagnosis) for entry in entries)],
            *(
                [name, row[0].target, *(format_criterion(criterion) for criterion in row)]
                for name, row in _by_criterion(entries)
            ),
        ],
    )
    if comparison.differences:
        ids = [entry.job.id for entry in entries]
        lines += ["", "## Settings that differ", ""]
        lines += _markdown_table(
            ["setting", *ids],
            [[key, *(str(v[i]) for i in ids)] for key, v in comparison.differences.items()],
        )
    return "\n".join(lines) + "\n"


def render_html(
    entries: Sequence[ReportEntry], comparison: "Comparison", *, thresholds: Thresholds
) -> str:
    """The whole comparison as one HTML file; names are escaped by the template."""
    environment = Environment(
        loader=PackageLoader("server"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(format_criterion=format_criterion, encode_png=_encode_png)
    return environment.get_template("report.html").render(
        entries=entries,
        comparison=comparison,
        rows=_by_criterion(entries),
        curves=render_curves(entries, thresholds=thresholds),
        made_at=f"{utc_now():%Y-%m-%d %H:%M} UTC",
    )


def format_criterion(criterion: Criterion) -> str:
    """`✓ 0.832`, `✗ 0.001` or `– no data`."""
    value = "no data" if criterion.value is None else f"{criterion.value:.4g}"
    return f"{_MARKS[criterion.status]} {value}"


def escape_markdown(text: str) -> str:
    """Make text inert in Markdown, in a table cell too."""
    escaped = "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").split())


def _name_in_full(entry: ReportEntry) -> str:
    return entry.label if entry.job.id in entry.label else f"{entry.label} ({entry.job.id})"


def _draw_entry(panels: "tuple[Axes, Axes, Axes]", entry: ReportEntry, *, index: int) -> None:
    epochs = [row.epoch for row in entry.metrics]
    curves = (
        [row.train_loss for row in entry.metrics],
        [row.train_pixel_accuracy for row in entry.metrics],
        [sum(row.val_kl_per_dimension) for row in entry.metrics],
    )
    for axes, values in zip(panels, curves, strict=True):
        axes.plot(
            epochs,
            values,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)] if len(epochs) <= 50 else None,
            markersize=4,
            linewidth=1.5,
            # A dollar sign would begin a formula, and a leading underscore hides a label.
            label="\N{ZERO WIDTH SPACE}" + entry.short_label.replace("$", r"\$"),
        )


def _mark_targets(axes: "Axes", entries: Sequence[ReportEntry], *, thresholds: Thresholds) -> None:
    axes.axhspan(
        thresholds.min_accuracy,
        thresholds.max_accuracy,
        color="#009E73",
        alpha=0.12,
        label="target",
    )
    summaries = [e.job.dataset_summary for e in entries if e.job.dataset_summary]
    for share in sorted({summary["background_share"] for summary in summaries})[:3]:
        axes.axhline(share, color="#555555", linestyle="--", linewidth=1, label="all background")
    handles, labels = axes.get_legend_handles_labels()
    marks = {
        label: handle
        for handle, label in zip(handles, labels, strict=True)
        if label in ("target", "all background")
    }
    axes.legend(marks.values(), marks.keys(), fontsize=8, loc="lower right")


def _by_criterion(entries: Sequence[ReportEntry]) -> list[tuple[str, list[Criterion]]]:
    """Each criterion's name with its answer for every job."""
    columns = [entry.verdict.criteria for entry in entries]
    return [(row[0].name, list(row)) for row in zip(*columns, strict=True)]


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(c if c == "---" else escape_markdown(c) for c in line) + " |"
        for line in lines
    ]


def _encode_png(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
