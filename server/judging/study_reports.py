"""Reports of a study: Markdown, and one HTML file that includes everything it shows.

Both show the same tables. Names are whatever a user chose: each format shows them literally.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlmodel import Session

from server.judging.criteria import (
    CriteriaSet,
    CriterionName,
    CriterionStatus,
    Thresholds,
    list_criteria,
    read_thresholds,
)
from server.judging.decisions import Recommendation, format_p_value
from server.judging.differences import ArmDifference, compare_kept_arms
from server.judging.facts import JobFacts, read_facts
from server.judging.groups import (
    GROUP_METRICS,
    RANKING_METRICS,
    GroupMetric,
    SeedResult,
    Side,
)
from server.judging.knowledge import Chance, MeasureTable
from server.judging.methods import Methods, describe_methods, list_sources, list_varied
from server.judging.numbers import NO_VALUE, format_number
from server.judging.reports import ReportPicture, read_picture
from server.judging.statistics import DecisionState
from server.judging.studies import ArmVerdict, ResultCache, StudyVerdict, judge_study
from server.models.studies import Study
from server.models.tables import Job
from server.texts import escape_markdown

#: Data sets on more than three different shares of background are rare.
_MAX_BACKGROUND_SHARES: Final = 3


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text, not escaped for any format; the first cell of a row names it."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    sides: Mapping[Side, int] = field(default_factory=dict)  # columns of each, after the first


@dataclass(frozen=True, slots=True)
class RunPicture:
    """The newest reconstructions of an arm's median or worst run."""

    title: str
    picture: ReportPicture | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """A study, judged, with what its report says beside the verdict."""

    study: Study
    verdict: StudyVerdict
    thresholds: Thresholds
    facts: Mapping[str, JobFacts]
    differences: list[ArmDifference]
    chance: Chance

    @property
    def title(self) -> str:
        return self.study.name or f"Study {self.study.id}"

    @property
    def job_ids(self) -> list[str]:
        return list(self.facts)

    @property
    def background_shares(self) -> list[float]:
        """The pixel accuracy of an all-background output on each of the study's data sets."""
        summaries = [each.summary for each in self.facts.values()]
        shares = {round(s["background_share"], 4) for s in summaries if "background_share" in s}
        return sorted(shares)[:_MAX_BACKGROUND_SHARES]

    @property
    def metrics(self) -> dict[GroupMetric, str]:
        """The titles of the metrics that any run has: old runs have not all of them."""
        arms = self.verdict.arms
        return {
            metric: registered.title
            for metric, registered in GROUP_METRICS.items()
            if any(arm.metrics[metric].median is not None for arm in arms)
        }

    @property
    def criteria(self) -> list[CriterionName]:
        """Those that the study is judged by."""
        return list_criteria(self.verdict.criteria_set)

    @property
    def ranking_metric(self) -> GroupMetric:
        """By which the median and the worst run of an arm are found."""
        return RANKING_METRICS[self.verdict.criteria_set]

    @property
    def ranking_title(self) -> str:
        return GROUP_METRICS[self.ranking_metric].title

    @property
    def methods(self) -> Methods:
        return Methods(
            study=self.study, verdict=self.verdict, thresholds=self.thresholds, facts=self.facts
        )


def make_report(
    session: Session,
    study: Study,
    *,
    thresholds: Thresholds | None = None,
    criteria_set: CriteriaSet | None = None,
    cache: ResultCache | None = None,
) -> StudyReport:
    """Judge a study for a report, by its own criteria and thresholds or by others."""
    verdict = judge_study(
        session, study, thresholds=thresholds, criteria_set=criteria_set, cache=cache
    )
    return StudyReport(
        study=study,
        verdict=verdict,
        thresholds=thresholds or read_thresholds(study.thresholds),
        facts=read_facts(session, study.id),
        differences=compare_kept_arms(verdict),
        chance=Chance.read(session, study.id),
    )


def read_pictures(
    session: Session, report: StudyReport, *, runs_dir: Path
) -> dict[str, list[RunPicture]]:
    """The pictures of each arm's median and worst run; one if both are the same run."""
    pictures: dict[str, list[RunPicture]] = {}
    for arm, results in zip(report.verdict.arms, report.verdict.results, strict=True):
        by_job = {result.job_id: result for result in results}
        runs = {"worst run": arm.worst_job_id} if arm.median_job_id != arm.worst_job_id else {}
        pictures[arm.arm] = [
            RunPicture(f"{name}: {_describe_run(by_job[job_id], report)}",
                       _read_picture(session, job_id, runs_dir=runs_dir))
            for name, job_id in {"median run": arm.median_job_id, **runs}.items()
            if job_id is not None
        ]  # fmt: skip
    return pictures


def _read_picture(session: Session, job_id: str, *, runs_dir: Path) -> ReportPicture | None:
    job = session.get(Job, job_id)
    return None if job is None else read_picture(session, job, runs_dir=runs_dir)


def _describe_run(result: SeedResult, report: StudyReport) -> str:
    value = format_number(result.metrics.get(report.ranking_metric))
    return f"seed {result.seed}, {report.ranking_title} {value}, {result.diagnosis or NO_VALUE}"


# -- what both formats show


def describe_state(recommendation: Recommendation) -> str:
    """The first words of the decision, before its reason."""
    match recommendation.state:
        case DecisionState.decided:
            return f"Recommended: {recommendation.arm}."
        case DecisionState.narrowed:
            return "Narrowed:"
        case DecisionState.undecided:
            return "Undecided:"
        case DecisionState.none:
            return "No recommendation:"
        case DecisionState.no_data:
            return "No data:"


def list_tables(report: StudyReport) -> list[Table]:
    """The tables in their order; those without rows are left out."""
    tables = [
        _tabulate_looks(report),
        _tabulate_arms(report),
        _tabulate_metrics(report),
        _tabulate_settings(report),
        _tabulate_differences(report),
        _tabulate_seeds(report),
    ]
    return [table for table in tables if table.rows]


def _tabulate_looks(report: StudyReport) -> Table:
    rows = [
        [
            f"{look.num_seeds} seeds",
            f"{look.at:%Y-%m-%d %H:%M} UTC" if look.at else NO_VALUE,
            ", ".join(look.ruled_out) or "none",
        ]
        for look in report.verdict.looks
    ]
    coming = report.verdict.coming_looks
    rows += [[f"{num_seeds} seeds", "still to come", ""] for num_seeds in coming]
    return Table("Looks", ["look after", "took place", "ruled out"], rows)


def _tabulate_arms(report: StudyReport) -> Table:
    ruled_out = {entry.arm: entry for entry in report.verdict.recommendation.ruled_out}
    rows = []
    for arm in report.verdict.arms:
        entry = ruled_out.get(arm.arm)
        state = (
            f"ruled out by {entry.by} after {entry.num_seeds} seeds, "
            f"{format_p_value(entry.p_value)}"
            if entry
            else arm.state.replace("_", " ")
        )
        rows.append(
            [
                arm.arm,
                f"{arm.num_passed} of {arm.num_judged}",
                _show_interval(arm.pass_rate_interval),
                state,
                str(arm.num_missing),
                _list_failed(arm),
                ", ".join(f"{number} {name}" for name, number in arm.diagnoses.items()) or NO_VALUE,
            ]
        )
    heading = ["arm", "passed", "95% interval", "state", "missing", "criteria failed", "diagnoses"]
    return Table("Arms", heading, rows)


def _list_failed(arm: ArmVerdict) -> str:
    """In how many seeds each criterion failed, the most frequent first."""
    failed = {each.name: each.num_judged - each.num_passed for each in arm.criteria}
    listed = sorted(failed.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {number}" for name, number in listed if number) or "none"


def _tabulate_metrics(report: StudyReport) -> Table:
    arms = [arm for arm in report.verdict.arms if arm.num_judged]
    measures = MeasureTable.of_arms(arms)
    note = "Median and range over the judged seeds, after the last epoch."
    return Table(
        "Values",
        ["arm", *measures.titles],
        [[arm.arm, *row] for arm, row in zip(arms, measures.rows, strict=True)],
        note=f"{note} {report.chance.describe()}".rstrip(),
        sides=measures.sides,
    )


def _tabulate_settings(report: StudyReport) -> Table:
    keys = list_varied(report.verdict.arms)
    rows = [
        [arm.arm, arm.option, *(str(arm.config.get(key, NO_VALUE)) for key in keys)]
        for arm in report.verdict.arms
    ]
    heading = ["arm", "option", *keys]
    return Table("Settings that differ", heading, rows if keys else [])


def _tabulate_differences(report: StudyReport) -> Table:
    rows = [
        [
            GROUP_METRICS[each.metric].title,
            f"{each.arm} minus {each.other}",
            _show_signed(each.median),
            f"{_show_signed(each.low)} to {_show_signed(each.high)}",
            str(each.num_pairs),
        ]
        for each in report.differences
    ]
    return Table(
        "Paired differences",
        ["metric", "arms", "median difference", "95% interval", "seeds"],
        rows,
        note="Between the best arms that are kept, over the seeds that both have. They decide "
        "nothing.",
    )


def _tabulate_seeds(report: StudyReport) -> Table:
    rows = [
        _describe_seed(arm, result, report)
        for arm, results in zip(report.verdict.arms, report.verdict.results, strict=True)
        for result in results
    ]
    heading = ["arm", "seed", "job", "status", "verdict", "criteria failed"]
    return Table("Seeds", [*heading, *report.metrics.values(), "epochs"], rows)


def _describe_seed(arm: ArmVerdict, result: SeedResult, report: StudyReport) -> list[str]:
    facts = report.facts.get(result.job_id or "")
    failed = [name for name, status in result.criteria.items() if status is CriterionStatus.failed]
    return [
        arm.arm,
        str(result.seed),
        result.job_id or "deleted",
        (result.status or NO_VALUE) + ", reused" * result.is_reused,
        _describe_verdict(result),
        ", ".join(failed) or NO_VALUE,
        *(format_number(result.metrics.get(metric)) for metric in report.metrics),
        str(facts.epochs_completed) if facts else NO_VALUE,
    ]


def _describe_verdict(result: SeedResult) -> str:
    if not result.is_finished:
        return "missing" if result.is_missing else NO_VALUE
    if not result.is_judged:
        return f"undecided, {result.diagnosis}"
    return f"{'✓' if result.has_passed else '✗'} {result.diagnosis}"


def _show_interval(interval: tuple[float, float] | None) -> str:
    return NO_VALUE if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _show_signed(value: float) -> str:
    return f"{value:+.3g}"


# -- Markdown


def render_study_markdown(report: StudyReport) -> str:
    """The report as Markdown, without pictures."""
    recommendation = report.verdict.recommendation
    decision = f"**{escape_markdown(describe_state(recommendation))}**"
    lines = [
        f"# {escape_markdown(report.title)}",
        "",
        f"{decision} {escape_markdown(recommendation.reason)}.",
    ]
    for table in list_tables(report):
        lines += ["", f"## {table.title}", "", *([table.note, ""] if table.note else [])]
        lines += _write_table(table)
    lines += ["", "## Methods"]
    for text in describe_methods(report.methods):
        lines += ["", escape_markdown(text)]
    lines += [
        "",
        "## Sources",
        "",
        *(f"- {escape_markdown(source)}" for source in list_sources(report.methods)),
    ]
    return "\n".join(lines) + "\n"


def _write_table(table: Table) -> Iterable[str]:
    sides = [side.name for side, number in table.sides.items() for _ in range(number)]
    # Markdown has one heading: `knows: foreground AP`.
    named = [f"{side}: {title}" for side, title in zip(sides, table.heading[1:], strict=False)]
    yield _write_row(map(escape_markdown, [table.heading[0], *(named or table.heading[1:])]))
    yield _write_row(["---"] * len(table.heading))
    for row in table.rows:
        yield _write_row(map(escape_markdown, row))


def _write_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
