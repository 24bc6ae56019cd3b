"""Curves and reports of any number of jobs, with hostile names."""

import io
from typing import Any

import pytest
from artificial_runs import make_epoch, make_job, make_measured_epoch, summarise
from conftest import TINY
from PIL import Image

from server.judging.charts import render_curves, shorten_label
from server.judging.comparisons import ComparedJob, Comparison, group_jobs, judge_groups
from server.judging.criteria import CriteriaSet, Thresholds
from server.judging.groups import SeedResult
from server.judging.ranking import JudgedJob, find_differences, rank
from server.judging.reports import render_html, render_markdown
from server.judging.verdicts import judge
from server.texts import escape_markdown

HOSTILE = "<script>alert(1)</script> $x_{$ a|b `c` **d** [e](javascript:f)\nnext"


def make_entry(
    *,
    num_epochs: int = 3,
    seed: int = 0,
    is_measured: bool = False,
    has_namesake: bool = False,
    **values: Any,
) -> ComparedJob:
    config = TINY | {"seed": seed}
    job = make_job(dataset_summary={"background_share": 0.93}, config=config, **values)
    make = make_measured_epoch if is_measured else make_epoch
    epochs = [summarise(make(epoch)) for epoch in range(1, num_epochs + 1)]
    return ComparedJob(job, judge(job, epochs), epochs, has_namesake=has_namesake)


def make_comparison(*entries: ComparedJob) -> Comparison:
    jobs = [entry.job for entry in entries]
    results = {
        entry.job.id: SeedResult.of(
            entry.job,
            entry.epochs,
            seed=entry.job.config["seed"],
            thresholds=Thresholds(),
            criteria_set=CriteriaSet.spec,
        )
        for entry in entries
    }
    groups, decision = judge_groups(
        group_jobs(jobs), results=results, criteria_set=CriteriaSet.spec
    )
    return Comparison(
        entries=list(entries),
        criteria_set=CriteriaSet.spec,
        thresholds=Thresholds(),
        ranking=rank([JudgedJob(entry.job, entry.verdict, entry.epochs) for entry in entries]),
        differences=find_differences(jobs),
        groups=groups,
        decision=decision,
    )


@pytest.mark.parametrize(("num_jobs", "num_epochs"), [(1, 0), (1, 1), (3, 5), (15, 2), (100, 60)])
def test_curves_are_a_picture_for_any_number_of_jobs(num_jobs: int, num_epochs: int) -> None:
    entries = [make_entry(num_epochs=num_epochs) for _ in range(num_jobs)]
    with Image.open(io.BytesIO(render_curves(make_comparison(*entries)))) as image:
        assert (image.format, image.size) == ("PNG", (1500, 450))


@pytest.mark.parametrize("num_epochs", [1, 60])
def test_curves_have_a_row_for_what_jobs_know_once_one_of_them_was_measured(
    num_epochs: int,
) -> None:
    old, new = make_entry(num_epochs=2), make_entry(num_epochs=num_epochs, is_measured=True)
    with Image.open(io.BytesIO(render_curves(make_comparison(old, new)))) as image:
        assert (image.format, image.size) == ("PNG", (1800, 900))


@pytest.mark.parametrize("name", [HOSTILE, "$x_{$", "_hidden", "\\frac", "Ünïcødé"])
def test_hostile_names_draw(name: str) -> None:
    entry = make_entry(name=name)
    with Image.open(io.BytesIO(render_curves(make_comparison(entry)))) as image:
        assert image.format == "PNG"


def test_long_names_leave_space_for_the_curves() -> None:
    label = shorten_label(make_entry(name="x" * 100 + "y" * 100, option="b").label)
    assert label == "b · " + "x" * 16 + "…" + "y" * 20


def test_jobs_of_one_name_are_told_apart_by_their_ids() -> None:
    namesake = make_entry(name="study", option="b", has_namesake=True)
    assert namesake.label == f"b · study ({namesake.job.id})"
    assert make_entry(name="study", option="b").label == "b · study"


def test_html_escapes_names_and_loads_nothing() -> None:
    entry = make_entry(name=HOSTILE)
    html = render_html(make_comparison(entry), pictures={entry.job.id: None})
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http://" not in html
    assert "https://" not in html
    assert "There is no picture." in html


def test_markdown_keeps_its_table_whatever_the_name() -> None:
    entries = [make_entry(name=HOSTILE), make_entry(name="plain")]
    markdown = render_markdown(make_comparison(*entries))
    tables = [part for part in markdown.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    for criterion in entries[0].verdict.criteria:
        assert f"| {criterion.name} | {escape_markdown(criterion.target)} |" in markdown
    assert "<script" not in markdown


def test_reports_set_what_jobs_know_beside_what_they_paint() -> None:
    entries = [make_entry(seed=seed, is_measured=True, config_sha256="same") for seed in (0, 1)]
    comparison = make_comparison(*entries)
    markdown = render_markdown(comparison)
    html = render_html(comparison, pictures={entry.job.id: None for entry in entries})
    # A table of the configuration and one of its two runs.
    assert markdown.count("| knows: foreground AP |") == 2
    assert "| 0.5 (0.5 to 0.5) |" in markdown
    assert html.count(">what it knows</th>") == 2
    for text in (markdown, html):
        assert "Of the cells 7.0% are foreground. Random scores have a foreground AP of" in text
        for name in ("Hoffman", "Burda", "Menon"):
            assert text.count(name) == 2


def test_reports_of_older_jobs_name_no_measure_that_they_lack() -> None:
    entry = make_entry()
    comparison = make_comparison(entry)
    for text in (
        render_markdown(comparison),
        render_html(comparison, pictures={entry.job.id: None}),
    ):
        assert "foreground AP" not in text
        assert "Hoffman" not in text
        assert "painted share" in text


def test_markdown_escapes_what_it_would_read_as_markup() -> None:
    assert escape_markdown("a|b `c` <d>\n[e]") == "a\\|b \\`c\\` &lt;d> \\[e\\]"
