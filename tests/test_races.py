"""Races: the next look is queued by itself until one arm is decided."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import BOTH_DATABASES
from sqlalchemy import Engine, select, update
from sqlmodel import Session, col
from study_results import (
    FIRST_END,
    end_seeds,
    judge,
    read_job_ids,
    read_study,
    submit_study,
)

from server.database.engine import open_database, write_transaction
from server.jobs import queue, seeds, studies
from server.jobs.admission import Admission
from server.judging.studies import ResultCache
from server.models.studies import Study, StudyJob
from server.models.tables import Job, JobStatus
from server.races import advance_races
from server.settings import Settings

pytestmark = BOTH_DATABASES

NO_LIMIT = 100_000


@pytest.fixture
def race(engine: Engine, settings: Settings) -> str:
    """A race of a, b and c that waits for its first five seeds."""
    return submit_study(engine, settings, options=["a", "b", "c"], until_decided=True)


def advance(
    engine: Engine, *, max_queued_jobs: int = NO_LIMIT, max_of_token: int | None = None
) -> int:
    admission = Admission(Path(), max_queued_jobs, max_of_token=max_of_token)
    return advance_races(engine, cache=ResultCache(), admission=admission)


def count_seeds(engine: Engine, study_id: str) -> list[int]:
    """The seeds that each arm has."""
    arms = range(len(read_study(engine, study_id).arms))
    return [len(read_job_ids(engine, study_id, arm)) for arm in arms]


def is_over(engine: Engine, study_id: str) -> bool:
    return read_study(engine, study_id).decided_at is not None


def test_race_begins_with_the_seeds_of_its_first_look(engine: Engine, race: str) -> None:
    assert read_study(engine, race).looks == [5, 10, 20, 40]
    assert count_seeds(engine, race) == [5, 5, 5]
    assert advance(engine) == 0
    assert count_seeds(engine, race) == [5, 5, 5]


def test_arm_that_is_ruled_out_gets_no_further_seeds(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "fffpp"})
    advance(engine)
    assert count_seeds(engine, race) == [5, 10, 10]
    assert read_study(engine, race).seeds == list(range(10))
    verdict = judge(engine, race)
    assert [look.ruled_out for look in verdict.looks] == [["a"]]
    assert (verdict.kept, verdict.next_look) == (["b", "c"], 10)


def test_race_ends_once_one_arm_is_decided(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "fffff"})
    advance(engine)
    assert count_seeds(engine, race) == [5, 5, 5]
    assert is_over(engine, race)
    verdict = judge(engine, race)
    assert (verdict.recommendation.state, verdict.recommendation.arm) == ("decided", "b")
    assert verdict.recommendation.job_id in read_job_ids(engine, race, 1)
    assert advance(engine) == 0, "it is looked at no more"


def test_race_ends_at_its_last_seed_without_a_decision(engine: Engine, settings: Settings) -> None:
    race = submit_study(engine, settings, until_decided=True, max_seeds=7)
    end_seeds(engine, race, {"a": "ppppp", "b": "ppppp"})
    advance(engine)
    assert count_seeds(engine, race) == [7, 7]
    end_seeds(engine, race, {"a": "pp", "b": "pp"}, first=5)
    advance(engine)
    assert is_over(engine, race)
    verdict = judge(engine, race)
    assert [look.num_seeds for look in verdict.looks] == [5, 7]
    assert (verdict.recommendation.state, verdict.next_look) == ("undecided", None)


def test_race_waits_for_every_job_of_its_look(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ffffr"})
    assert advance(engine) == 0
    end_seeds(engine, race, {"c": "ffffq"})
    assert advance(engine) == 0
    assert count_seeds(engine, race) == [5, 5, 5]


def test_lost_seed_does_not_change_a_look_when_the_next_seeds_end(
    engine: Engine, race: str
) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppopp", "c": "fffpp"})
    before = judge(engine, race).looks
    assert [look.ruled_out for look in before] == [["a"]]
    advance(engine)
    assert judge(engine, race).looks == before, "while the next seeds wait"
    end_seeds(engine, race, {"b": "fffff", "c": "ppppp"}, first=5)
    verdict = judge(engine, race)
    assert verdict.looks[:1] == before
    assert verdict.looks[1].num_seeds == 10
    assert verdict.next_look == 20


def test_race_whose_round_was_lost_ends_and_goes_on_when_it_is_resumed(
    engine: Engine, race: str
) -> None:
    end_seeds(engine, race, {"a": "uuuuu", "b": "uuuuu", "c": "uuuuu"})
    advance(engine)
    assert is_over(engine, race)
    assert count_seeds(engine, race) == [5, 5, 5]
    verdict = judge(engine, race)
    assert (verdict.looks, verdict.next_look) == ([], None)
    assert verdict.recommendation.reason == "nothing was decided: no look took place"
    with write_transaction(engine) as session:
        assert studies.is_racing(studies.resume_study(session, race))
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    advance(engine)
    assert count_seeds(engine, race) == [5, 10, 10]


def test_arm_that_comes_back_gets_the_seeds_that_it_lacks(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "ffffo", "b": "ppppp", "c": "ppppp"})
    advance(engine)
    assert count_seeds(engine, race) == [5, 10, 10]
    with write_transaction(engine) as session:
        studies.resume_study(session, race)
    end_seeds(engine, race, {"a": "fpfpp", "b": "pppppppppp", "c": "pppppppppp"})
    advance(engine)
    assert judge(engine, race).next_look == 10
    assert count_seeds(engine, race) == [10, 10, 10]
    assert not is_over(engine, race)


def test_race_of_one_arm_that_passes_too_rarely_goes_on(engine: Engine, settings: Settings) -> None:
    race = submit_study(engine, settings, options=["b"], until_decided=True, max_seeds=10)
    end_seeds(engine, race, {"b": "pppff"})
    advance(engine)
    assert count_seeds(engine, race) == [10]


def test_race_goes_on_after_a_restart(engine: Engine, settings: Settings, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    again = open_database(settings)
    advance(again)
    again.dispose()
    assert count_seeds(engine, race) == [5, 10, 10]


def test_two_servers_queue_a_look_once(engine: Engine, settings: Settings, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    engines = [open_database(settings) for _ in range(4)]
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(advance, engines))
    for each in engines:
        each.dispose()
    assert count_seeds(engine, race) == [5, 10, 10]
    assert read_study(engine, race).rounds == [5, 10]


@pytest.mark.parametrize(
    ("limit", "told"), [("max_queued_jobs", "LOSSLAB_MAX_QUEUED_JOBS"), ("max_of_token", "'ada'")]
)
def test_next_look_waits_for_room_in_the_queue_and_in_its_tokens_share(
    engine: Engine, race: str, caplog: pytest.LogCaptureFixture, limit: str, told: str
) -> None:
    with write_transaction(engine) as session:
        studies.lock_study(session, race).queued_by = "ada"
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    advance(engine, **{limit: 9})
    assert count_seeds(engine, race) == [5, 5, 5]
    assert told in caplog.text
    advance(engine, **{limit: 10})
    assert count_seeds(engine, race) == [5, 10, 10]


@pytest.mark.parametrize("command", [studies.pause_study, studies.cancel_study])
def test_stopped_race_queues_nothing_until_it_is_resumed(
    engine: Engine, race: str, command: studies.Command
) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    with write_transaction(engine) as session:
        command(session, race)
    assert advance(engine) == 0
    with write_transaction(engine) as session:
        studies.resume_study(session, race)
    assert advance(engine) == 1
    assert count_seeds(engine, race) == [5, 10, 10]


def test_race_that_is_over_goes_on_with_seeds_that_are_asked_for(
    engine: Engine, settings: Settings
) -> None:
    race = submit_study(engine, settings, until_decided=True, max_seeds=5)
    end_seeds(engine, race, {"a": "ppppp", "b": "ppppp"})
    advance(engine)
    assert is_over(engine, race)
    with write_transaction(engine) as session:
        seeds.extend_study(session, race, num_seeds=1, arms=["a", "b"], looks=[5, 6])
    assert judge(engine, race).next_look == 6
    end_seeds(engine, race, {"a": "p", "b": "p"}, first=5)
    advance(engine)
    assert is_over(engine, race)
    verdict = judge(engine, race)
    assert [look.num_seeds for look in verdict.looks] == [5, 6]
    assert "the error of 5% holds for the looks that were planned" in verdict.recommendation.reason


@pytest.mark.parametrize(
    "stored",
    [
        {"criteria": "of a later version"},
        {"thresholds": {"no_such_threshold": 1}},
        {"thresholds": {"min_accuracy": 7}},
        {"looks": {"after": 5}},
        {"arms": []},
    ],
    ids=str,
)
def test_race_of_another_version_waits_for_it_and_does_not_stop_the_others(
    engine: Engine,
    settings: Settings,
    race: str,
    caplog: pytest.LogCaptureFixture,
    stored: dict[str, Any],
) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    broken = submit_study(engine, settings, options=["a"], until_decided=True, max_seeds=1)
    end_seeds(engine, broken, {"a": "p"})
    with engine.begin() as connection:
        outdated = update(Study).where(col(Study.id) == broken)
        connection.execute(outdated.values(stored))
    advance(engine)
    assert count_seeds(engine, race) == [5, 10, 10]
    assert f"the next look of study {broken} waits: another version" in caplog.text
    assert not is_over(engine, broken)


def test_next_look_is_claimed_seed_by_seed_with_the_arms_in_turn(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    advance(engine)
    names = []
    while job := queue.claim(engine, worker_id="w", lease_seconds=60):
        names.append(job.name)
    assert names == [f"{arm} seed {seed}" for seed in range(5, 10) for arm in "bc"]


def test_looks_say_when_the_last_job_that_they_needed_ended(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    (look,) = judge(engine, race).looks
    assert look.at == FIRST_END + timedelta(minutes=5)


def test_jobs_of_a_race_carry_its_id(engine: Engine, race: str) -> None:
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp", "c": "ppppp"})
    advance(engine)
    with Session(engine) as session:
        found = session.execute(select(col(Job.study_id), col(Job.status))).all()
        links = session.scalars(select(col(StudyJob.study_id))).all()
    assert {row.study_id for row in found} == {race}
    assert len(found) == len(links) == 25
    assert [row.status for row in found].count(JobStatus.queued) == 10


def test_race_that_was_decided_looks_again_at_seeds_that_are_asked_for(
    engine: Engine, settings: Settings
) -> None:
    race = submit_study(engine, settings, until_decided=True)
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp"})
    advance(engine)
    assert judge(engine, race).recommendation.arm == "b"
    with write_transaction(engine) as session:
        seeds.extend_study(session, race, num_seeds=5, arms=["b"], looks=[5, 10, 20, 40])
    assert judge(engine, race).next_look == 10
    end_seeds(engine, race, {"b": "fffff"}, first=5)
    verdict = judge(engine, race)
    assert [look.num_seeds for look in verdict.looks] == [5, 10]
    assert verdict.recommendation.state == "narrowed"
    assert verdict.recommendation.reason.startswith("b is left: b passed 5 of 10; a is ruled out")
    assert verdict.next_look == 20


def test_race_goes_on_with_seeds_that_are_asked_for_after_a_lost_round(
    engine: Engine, settings: Settings
) -> None:
    race = submit_study(engine, settings, until_decided=True)
    end_seeds(engine, race, {"a": "ppfff", "b": "ppppf"})
    advance(engine)
    end_seeds(engine, race, {"a": "ccccc", "b": "ccccc"}, first=5)
    advance(engine)
    assert is_over(engine, race)
    with write_transaction(engine) as session:
        seeds.extend_study(session, race, num_seeds=5, arms=["a", "b"], looks=[5, 10, 20, 40])
    end_seeds(engine, race, {"a": "fffff", "b": "ppppp"}, first=10)
    assert judge(engine, race).next_look == 20
    advance(engine)
    assert not is_over(engine, race)
    assert count_seeds(engine, race) == [20, 20]
