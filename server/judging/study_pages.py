"""A study's report as one HTML file that includes its pictures."""

from collections.abc import Mapping, Sequence
from functools import cache

from jinja2 import Environment, PackageLoader

from server.judging.histories import EpochSummary
from server.judging.methods import describe_methods, list_sources
from server.judging.numbers import format_share
from server.judging.reports import encode_png
from server.judging.study_charts import render_study_curves
from server.judging.study_reports import (
    RunPicture,
    StudyReport,
    describe_state,
    list_tables,
)
from server.models.columns import utc_now
from server.texts import show_controls


def render_study_html(
    report: StudyReport,
    *,
    histories: Mapping[str, Sequence[EpochSummary]],
    pictures: Mapping[str, Sequence[RunPicture]],
) -> str:
    """The report with the curves of all seeds, and pictures by arm. The template escapes names."""
    return (
        _load_templates()
        .get_template("study_report.html")
        .render(
            report=report,
            tables={table.title: table for table in list_tables(report)},
            pictures=pictures,
            curves=render_study_curves(report, histories),
            methods=describe_methods(report.methods),
            sources=list_sources(report.methods),
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
        png=encode_png, round_percent=format_share, state=describe_state, visible=show_controls
    )
    return environment
