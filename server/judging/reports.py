"""Reports of a comparison: Markdown, and one HTML file that includes everything it shows."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader
from sqlmodel import Session, col, select

from server.files.artifacts import JobFiles
from server.judging.charts import render_curves
from server.judging.comparisons import ComparedJob, Comparison
from server.judging.criteria import Criterion
from server.judging.knowledge import METHOD, SOURCES, Chance, MeasureTable
from server.judging.numbers import NO_VALUE, format_criterion, format_share
from server.models.columns import utc_now
from server.models.tables import Artifact, ArtifactKind, Job
from server.texts import escape_markdown, make_inert


@dataclass(frozen=True, slots=True)
class ReportPicture:
    """A job's newest reconstructions, as PNG."""

    png: bytes
    epoch: int


def read_picture(session: Session, job: Job, *, runs_dir: Path) -> ReportPicture | None:
    """The newest picture of a job; None if there is none, or if its file is missing or changed: a
    report without a picture is better than no report."""
    newest = (
        select(Artifact)
        .where(Artifact.job_id == job.id, Artifact.kind == ArtifactKind.reconstruction)
        .order_by(col(Artifact.epoch).desc())
    )
    artifact = session.exec(newest).first()
    if artifact is None:
        return None
    try:
        files = JobFiles(runs_dir, job.id)
        path = files.verified_path(artifact.file_name, sha256=artifact.sha256)
        return ReportPicture(path.read_bytes(), artifact.epoch)
    except FileNotFoundError:
        return None


def render_markdown(comparison: Comparison) -> str:
    """Recommendation, criteria and differences as Markdown."""
    entries = comparison.entries
    lines = ["# Comparison", "", escape_markdown(comparison.reason)]
    if comparison.has_repeats:
        lines += ["", "## Groups", "", *_list_groups(comparison)]
    lines += ["", "## Criteria", ""]
    lines += _markdown_table(
        ["criterion", "target", *(_label_with_id(entry) for entry in entries)],
        [
            ["diagnosis", "", *(str(entry.verdict.diagnosis) for entry in entries)],
            *(
                [name, row[0].target, *(_show(criterion) for criterion in row)]
                for name, row in comparison.by_criterion()
            ),
        ],
    )
    lines += ["", "## What it paints and what it knows", "", *_list_measures(comparison)]
    if comparison.differences:
        ids = [entry.job.id for entry in entries]
        lines += ["", "## Settings that differ", ""]
        lines += _markdown_table(
            ["setting", *ids],
            [[key, *(str(v[i]) for i in ids)] for key, v in comparison.differences.items()],
        )
    return "\n".join(lines) + "\n"


def _list_groups(comparison: Comparison) -> list[str]:
    """The pass rate of each configuration with several runs, as a table."""
    rows = []
    for group in comparison.groups:
        interval = group.pass_rate_interval
        shown = " to ".join(map(format_share, interval)) if interval else NO_VALUE
        passed = f"{group.num_passed} of {group.num_judged}"
        rows.append([group.arm, passed, shown, group.state.replace("_", " ")])
    return _markdown_table(["configuration", "passed", "pass rate, 95 %", "state"], rows)


def _list_measures(comparison: Comparison) -> list[str]:
    """The tables of what configurations with several runs and jobs paint and know."""
    histories = [entry.epochs for entry in comparison.entries]
    runs = MeasureTable.of_runs(histories)
    lines = []
    if comparison.has_repeats:
        arms = MeasureTable.of_arms(comparison.groups)
        names = [group.arm for group in comparison.groups]
        lines += [*_write_measures(arms, names, first="configuration"), ""]
    lines += _write_measures(runs, [_label_with_id(e) for e in comparison.entries], first="job")
    if runs.has_measures:
        lines += ["", escape_markdown(f"{Chance.of_runs(histories).describe()} {METHOD}"), ""]
        lines += [f"- {escape_markdown(source)}" for source in SOURCES]
    return lines


def _write_measures(table: MeasureTable, names: list[str], *, first: str) -> list[str]:
    rows = [[name, *row] for name, row in zip(names, table.rows, strict=True)]
    return _markdown_table([first, *table.columns], rows)


def render_html(comparison: Comparison, *, pictures: Mapping[str, ReportPicture | None]) -> str:
    """The comparison as one HTML file, with pictures by job id. The template escapes names."""
    histories = [entry.epochs for entry in comparison.entries]
    return (
        _load_templates()
        .get_template("report.html")
        .render(
            comparison=comparison,
            pictures=pictures,
            measures=MeasureTable.of_runs(histories),
            group_measures=MeasureTable.of_arms(comparison.groups),
            chance=Chance.of_runs(histories),
            method=METHOD,
            sources=SOURCES,
            curves=render_curves(comparison),
            made_at=f"{utc_now():%Y-%m-%d %H:%M} UTC",
        )
    )


@cache
def _load_templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("server.judging"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        inert=make_inert, criterion=_show, png=encode_png, share=format_share
    )
    return environment


def _show(criterion: Criterion) -> str:
    return format_criterion(criterion.status, criterion.value)


def _label_with_id(entry: ComparedJob) -> str:
    return entry.label if entry.job.id in entry.label else f"{entry.label} ({entry.job.id})"


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(c if c == "---" else escape_markdown(c) for c in line) + " |"
        for line in lines
    ]


def encode_png(png: bytes) -> str:
    """A picture as a link that carries it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
