"""What a model knows beside what it paints: in words, as tables, and its levels of chance."""

import io

import pytest
from artificial_runs import make_epoch, make_job
from conftest import BOTH_DATABASES
from known_measures import make_known
from rich.console import Console
from sqlalchemy import Engine, update
from sqlmodel import Session, col, select
from stored_studies import store_study

import worker.information as worker_information
from server.cli.views import epochs_table
from server.judging import knowledge
from server.judging.groups import GROUP_METRICS, GroupMetric, Side
from server.judging.histories import read_histories
from server.judging.knowledge import (
    Chance,
    MeasureTable,
    describe_run,
    find_levels,
    is_measured,
)
from server.models.epochs import EpochMetrics
from server.models.studies import StudyJob

# -- in words


def test_model_that_knows_and_paints_nothing_is_told_from_one_that_does_neither() -> None:
    assert describe_run(make_job(), [make_known("decision_collapse")]) == (
        "It paints 0.1% of the cells where 6.9% are foreground; at the true share the same weights "
        "reach IoU 0.10. Its latent carries 6.2 nats about the grid; foreground AP 0.36, chance "
        "0.069; colour AP 0.13, chance 0.0077."
    )
    told = describe_run(make_job(), [make_known("posterior_collapse")])
    assert told is not None
    assert "Its latent carries 0.0 nats about the grid; foreground AP 0.10, chance 0.069" in told


def test_estimate_of_no_information_is_never_told_as_less_than_none() -> None:
    told = describe_run(make_job(), [make_known(val_mutual_information=-0.06)])
    assert told is not None
    assert "carries 0.0 nats" in told


@pytest.mark.parametrize(
    ("num_val", "information", "told"),
    [
        (10_000, 8.6, "carries 8.6 nats"),
        (10_000, 8.8, "carries at least 8.8 nats"),
        (40_000, 8.8, "carries at least 8.8 nats"),
        (600, 5.8, "carries 5.8 nats"),
        (600, 6.0, "carries at least 6.0 nats"),
    ],
)
def test_information_near_the_most_that_the_grids_can_show_is_told_as_a_lower_bound(
    num_val: int, information: float, told: str
) -> None:
    job = make_job(dataset_summary={"num_val": num_val, "background_share": 0.93})
    assert told in (describe_run(job, [make_known(val_mutual_information=information)]) or "")


def test_server_and_worker_agree_on_the_grids_that_show_information() -> None:
    assert knowledge.MAX_GRIDS == worker_information.MAX_GRIDS


def test_job_older_than_the_measures_tells_only_what_it_paints() -> None:
    job = make_job(dataset_summary={"background_share": 0.93})
    epochs = [make_epoch(val_background_share=0.815)]
    assert describe_run(job, epochs) == "It paints 18.5% of the cells where 7.0% are foreground."
    assert describe_run(make_job(), epochs) == "It paints 18.5% of the cells."
    assert not is_measured(epochs)


def test_data_without_foreground_has_no_average_precision_to_tell() -> None:
    nothing = dict.fromkeys(
        ("val_foreground_ap", "val_colour_ap", "val_colour_prevalence", "val_matched_iou")
    )
    epoch = make_known(**nothing | {"val_foreground_share": 0.0, "val_background_share": 1.0})
    assert describe_run(make_job(), [epoch]) == (
        "It paints 0.0% of the cells where 0.0% are foreground. Its latent carries 8.9 nats about "
        "the grid."
    )


def test_before_the_first_epoch_nothing_is_told_and_nothing_is_missing() -> None:
    assert describe_run(make_job(), []) is None
    assert is_measured([])


# -- levels of chance


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([], ()),
        ([None, None], ()),
        ([0.069, None, 0.0685, 0.0695], (0.069,)),
        ([0.2, 0.069, 0.201], (0.069, 0.2005)),
        ([0.5, 0.1, 0.2, 0.3], (0.1, 0.2, 0.3)),
        ([0.0, 0.0], (0.0,)),
    ],
)
def test_levels_that_are_alike_are_one(
    values: list[float | None], levels: tuple[float, ...]
) -> None:
    assert find_levels(values) == pytest.approx(levels)


@BOTH_DATABASES
def test_levels_of_a_study_are_those_of_its_last_epochs(engine: Engine) -> None:
    study_id = store_study(engine, {"a": ["mode_collapse"] * 2, "b": ["healthy"] * 2})
    with engine.begin() as connection:
        first = update(EpochMetrics).where(col(EpochMetrics.epoch) == 1)
        connection.execute(first.values(val_foreground_share=0.5))
    with Session(engine) as session:
        jobs = session.scalars(select(StudyJob.job_id).where(StudyJob.study_id == study_id)).all()
        histories = read_histories(session, filter(None, jobs))
        chance = Chance.read(session, study_id)
    assert chance == Chance.of_runs(histories.values())
    assert chance == Chance((0.07,), (0.0078,))
    assert chance.describe() == (
        "Of the cells 7.0% are foreground. Random scores have a foreground AP of 0.07 and a "
        "colour AP of 0.0078."
    )


def test_levels_of_jobs_that_are_older_are_not_told() -> None:
    chance = Chance.of_runs([[make_epoch()], []])
    assert chance == Chance()
    assert chance.describe() == ""


# -- tables


def test_table_has_what_is_painted_beside_what_is_known() -> None:
    table = MeasureTable.of_runs([[make_known()], [make_epoch(val_background_share=0.8)], []])
    assert table.sides == {Side.paints: 5, Side.knows: 6}
    sides = [GROUP_METRICS[metric].side for metric in table.metrics]
    assert sides == sorted(sides, key=list(Side).index)
    assert table.has_measures
    rows = [dict(zip(table.metrics, row, strict=True)) for row in table.rows]
    assert rows[0][GroupMetric.val_painted_share] == "0.185"
    assert rows[0][GroupMetric.val_foreground_ap] == "0.38"
    assert rows[1][GroupMetric.val_painted_share] == "0.2"
    assert rows[1][GroupMetric.val_foreground_ap] == "–"
    assert set(rows[2].values()) == {"–"}
    assert table.columns[0] == "paints: foreground IoU"
    assert table.columns[-1] == "knows: active dimensions"


def test_table_of_older_jobs_leaves_out_what_none_of_them_has() -> None:
    table = MeasureTable.of_runs([[make_epoch(val_background_share=0.8, val_foreground_iou=0.1)]])
    assert table.titles == [
        "foreground IoU",
        "training accuracy",
        "foreground recall",
        "painted share",
        "weakest KL (nats)",
    ]
    assert not table.has_measures


def test_epochs_with_what_the_model_knows_fit_into_a_narrow_terminal() -> None:
    reached = {"train_kl_per_dimension": [0.5], "val_loss": 12.3456, "train_loss": 12.3456}
    row = make_known(epoch=100, **reached).model_dump()
    console = Console(width=80, file=io.StringIO())
    console.print(epochs_table([row, row | {"val_foreground_ap": None}]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    heading, *rows = [line.split() for line in shown.splitlines() if line.split()[1:]][1:]
    assert [row[heading.index("AP")] for row in rows] == ["0.38", "–"]
