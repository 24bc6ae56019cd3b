"""What a study answers: its looks, its arms seed by seed, and by which thresholds."""

from pathlib import Path

import pytest
from conftest import BOTH_DATABASES, problem
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select, update
from sqlmodel import Session, col
from study_results import (
    FIRST_END,
    PASSING,
    command,
    count_statements,
    end_seeds,
    judge,
    post,
    read,
    read_job_ids,
    read_study,
    submit_study,
)

from server.jobs import queue, studies
from server.jobs.admission import Admission
from server.judging.studies import ResultCache
from server.models.epochs import EpochMetrics
from server.models.studies import StudyJob
from server.models.tables import JobStatus
from server.races import advance_races
from server.settings import Settings

pytestmark = BOTH_DATABASES


def test_look_uses_the_first_judged_seeds_and_waits_for_them(
    engine: Engine, settings: Settings
) -> None:
    study_id = submit_study(engine, settings, num_seeds=10)
    end_seeds(engine, study_id, {"a": "fff", "b": "ppp"})
    end_seeds(engine, study_id, {"a": "ppppp", "b": "fffff"}, first=5)
    assert (judge(engine, study_id).looks, judge(engine, study_id).next_look) == ([], 5)
    end_seeds(engine, study_id, {"a": "oo", "b": "pp"}, first=3)
    first, _ = judge(engine, study_id).looks
    assert (first.num_seeds, first.ruled_out) == (5, []), "two of five against five of five"
    end_seeds(engine, study_id, {"a": "ff"}, first=3)
    first, _ = judge(engine, study_id).looks
    assert (first.num_seeds, first.ruled_out) == (5, ["a"])


def test_look_does_not_change_when_later_seeds_end_first(
    engine: Engine, settings: Settings
) -> None:
    study_id = submit_study(engine, settings, num_seeds=10)
    end_seeds(engine, study_id, PASSING)
    before = judge(engine, study_id)
    assert [look.ruled_out for look in before.looks] == [["a"]]
    end_seeds(engine, study_id, {"a": "qpppp", "b": "qffff"}, first=5)
    after = judge(engine, study_id)
    assert after.looks == before.looks
    assert after.recommendation.reason == before.recommendation.reason
    assert (after.arms[0].num_judged, after.next_look) == (9, 10)


def test_cancelled_study_is_judged_by_what_there_is(client: TestClient, engine: Engine) -> None:
    study = post(client, num_seeds=20)
    end_seeds(engine, study["id"], {"a": "fffffff", "b": "ppppppp"})
    found = command(client, study, "cancel")
    assert [look["num_seeds"] for look in found["looks"]] == [5, 10]
    assert (found["next_look"], found["status"]) == (None, "cancelled")
    assert found["arms"][0]["num_missing"] == 13
    assert found["recommendation"]["reason"].startswith("b escapes collapse, 7 of 7; a is ruled")
    caveat = "It was cancelled before this look was due: the error of 5% holds for the looks that"
    assert caveat in found["recommendation"]["reason"]
    report = client.get(f"/studies/{study['id']}/report.md").text
    assert "The study was cancelled before its last look was due" in report


def test_study_cancelled_after_its_look_says_nothing_else(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=20)
    end_seeds(engine, study["id"], PASSING)
    found = command(client, study, "cancel")
    assert [look["num_seeds"] for look in found["looks"]] == [5]
    assert "cancelled" not in found["recommendation"]["reason"]


def test_look_at_seeds_of_later_is_late_although_the_planned_one_saw_nothing(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=5)
    end_seeds(engine, study["id"], {"a": "ccccc", "b": "ccccc"})
    client.post(f"/studies/{study['id']}/seeds", json={"num": 5}).raise_for_status()
    report = client.get(f"/studies/{study['id']}/report.md").text
    assert "10 seeds | still to come" in report
    assert "| 5 seeds | still to come" not in report
    end_seeds(engine, study["id"], PASSING, first=5)
    found = read(client, study)
    assert [look["num_seeds"] for look in found["looks"]] == [10]
    assert "Seeds were added later" in found["recommendation"]["reason"]
    report = client.get(f"/studies/{study['id']}/report.md").text
    assert "0 of 1 took place. Seeds were added later, with looks after 10 seeds" in report


def test_seed_that_a_criterion_has_no_data_for_counts_as_nothing(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=5)
    end_seeds(engine, study["id"], {"a": "ppppp", "b": "ppppp"})
    with engine.begin() as connection:
        of_a = select(StudyJob.job_id).where(col(StudyJob.arm) == 0)
        without = update(EpochMetrics).where(col(EpochMetrics.job_id).in_(of_a))
        connection.execute(without.values(val_foreground_recall=None))
    found = read(client, study)
    undecided, judged = found["arms"]
    assert (undecided["num_judged"], undecided["num_undecided"], undecided["num_missing"]) == (
        0,
        5,
        0,
    )
    assert {seed["has_passed"] for seed in undecided["seeds"]} == {None}
    assert undecided["median_job_id"] in undecided["jobs"]
    assert judged["num_passed"] == 5
    assert found["recommendation"]["ruled_out"] == []
    assert "no seed of a was judged" in found["recommendation"]["reason"]
    report = client.get(f"/studies/{study['id']}/report.md").text
    assert "Not judged, because a criterion had no data: 5 of a." in report
    assert "undecided" in client.get(f"/ui/studies/{study['id']}").text


def test_thresholds_of_the_request_are_kept_and_those_of_a_query_judge_anew(
    client: TestClient, engine: Engine
) -> None:
    strict = {"min_foreground_recall": 0.7}
    study = post(client, thresholds=strict)
    end_seeds(engine, study["id"], PASSING)
    assert read(client, study)["thresholds"] == strict
    assert [arm["num_passed"] for arm in read(client, study)["arms"]] == [0, 0]
    lenient = read(client, study, min_foreground_recall=0.3)
    assert [arm["num_passed"] for arm in lenient["arms"]] == [0, 5]
    assert lenient["recommendation"]["arm"] == "b"
    assert lenient["thresholds"] == {}, "those that this answer judges by"
    assert read(client, study, max_spike_ratio=1)["thresholds"] == strict | {"max_spike_ratio": 1}
    assert [arm["num_passed"] for arm in read(client, study)["arms"]] == [0, 0]


def test_thresholds_of_a_query_need_fit_only_those_of_the_study(client: TestClient) -> None:
    study = post(client, thresholds={"min_accuracy": 0.9, "max_accuracy": 1.0})
    read(client, study, min_accuracy=0.95)
    read(client, study, max_accuracy=0.92)
    bad = client.get(f"/studies/{study['id']}", params={"max_accuracy": 0.8})
    (error,) = problem(bad, 422)["errors"]
    assert error["field"] == "max_accuracy"
    assert "min_accuracy must not be above max_accuracy" in error["message"]
    assert "the study's own min_accuracy is 0.9" in error["message"]


def test_answer_has_every_seed_of_every_arm(client: TestClient, engine: Engine) -> None:
    study = post(client, num_seeds=3)
    end_seeds(engine, study["id"], {"a": "fdn", "b": "ppr"})
    first, second = read(client, study)["arms"]
    assert [seed["has_passed"] for seed in first["seeds"]] == [False, None, False]
    assert [seed["status"] for seed in first["seeds"]] == ["succeeded", None, "failed"]
    assert [seed["seed"] for seed in first["seeds"]] == [0, 1, 2]
    assert first["jobs"][1] is None
    assert second["metrics"]["val_foreground_iou"]["values"] == [0.2, 0.2, None]
    assert second["pass_rate_interval"] == pytest.approx([0.3424, 1.0], abs=1e-4)
    assert second["diagnoses"] == {"healthy": 2}


def test_results_are_read_with_few_statements_whatever_the_number_of_arms_and_seeds(
    engine: Engine, settings: Settings
) -> None:
    cache, numbers = ResultCache(), []
    for num_arms, num_seeds in ((1, 2), (10, 8)):
        grid = {"beta": [number / 10 for number in range(num_arms)]}
        study_id = submit_study(engine, settings, options=["b"], grid=grid, num_seeds=num_seeds)
        arms = [arm["name"] for arm in read_study(engine, study_id).arms]
        end_seeds(engine, study_id, dict.fromkeys(arms, "p" * num_seeds))
        for _ in range(2):
            reading = lambda i=study_id: judge(engine, i, cache=cache)  # noqa: E731
            numbers.append(count_statements(engine, reading))
    # One statement for the epochs, and one for the KL of the last ones.
    assert numbers == [numbers[0], numbers[0] - 2] * 2, "the epochs are read once"
    with Session(engine) as session:
        listing = lambda: studies.read_studies(session, after=None, limit=20)  # noqa: E731
        assert count_statements(engine, listing) == 2


def test_job_that_vanishes_while_a_study_is_judged_is_missing(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=1)
    end_seeds(engine, study["id"], {"a": "f", "b": "p"})
    (job_id,) = read_job_ids(engine, study["id"], 0)
    assert job_id is not None
    queue.remove(engine, job_id)
    found = read(client, study)
    assert (found["arms"][0]["num_missing"], found["num_jobs"]) == (1, 2)
    assert found["recommendation"]["kept"] == ["a", "b"]


def test_race_is_looked_at_by_the_server(client: TestClient, engine: Engine) -> None:
    study = post(client, until_decided=True, max_seeds=5)
    end_seeds(engine, study["id"], PASSING)
    advance_races(engine, cache=ResultCache(), admission=Admission(Path(), 100))
    found = read(client, study)
    assert (found["status"], found["recommendation"]["arm"]) == (JobStatus.succeeded, "b")
    assert found["looks"][0]["at"].startswith(f"{FIRST_END:%Y-%m-%d}")
