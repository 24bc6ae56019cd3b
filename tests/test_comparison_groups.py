"""Comparisons judge the jobs of one configuration together, and say that one run cannot decide."""

from typing import Any

import pytest
from artificial_runs import BLACK, history, make_job
from conftest import BOTH_DATABASES, LENIENT, TINY, drain, open_client
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlmodel import Session

from server.judging.comparisons import Comparison, compare
from server.judging.criteria import CriteriaSet, Thresholds
from server.judging.histories import History
from server.judging.statistics import DecisionState
from server.main import create_app
from server.models.configuration import TrainingConfig, compute_config_sha256
from server.models.tables import FailureKind, Job, JobStatus
from server.settings import Settings

pytestmark = BOTH_DATABASES

HEALTHY = history(train_recon_loss=[1.0, 0.9, 0.8])
COLLAPSED = history(**BLACK)


def make_seed(seed: int, *, option: str = "b", status: JobStatus = JobStatus.succeeded,
              settings: dict[str, Any] | None = None, **values: Any) -> Job:  # fmt: skip
    config = TrainingConfig(epochs=3, seed=seed, **settings or {})
    identity = compute_config_sha256(config) + option
    return make_job(
        status,
        id=f"{option}{seed}" + "0" * (11 - len(str(seed))),
        option=option,
        config=config.model_dump(mode="json"),
        config_sha256=identity[-64:],
        **values,
    )


@pytest.fixture
def store(engine: Engine) -> Any:
    """Stores jobs with their epochs and compares them."""

    def store(runs: list[tuple[Job, History]], **limits: float) -> Comparison:
        with Session(engine, expire_on_commit=False) as session:
            session.add_all([job for job, _ in runs])
            session.flush()
            for job, epochs in runs:
                for row in epochs:
                    session.add(type(row)(**_complete(row, job_id=job.id)))
            session.commit()
        with Session(engine) as session:
            jobs = [job for job, _ in runs]
            limits_ = Thresholds(**limits)
            return compare(session, jobs, thresholds=limits_, criteria_set=CriteriaSet.spec)

    return store


def _complete(row: Any, *, job_id: str) -> dict[str, Any]:
    """All columns of a stored epoch; those that do not matter here are zero."""
    values = {name: getattr(row, name, None) for name in type(row).model_fields}
    empty = {name: [] if "_per_" in name else 0 for name in values}
    known = {name: value for name, value in values.items() if value is not None}
    return empty | known | {"job_id": job_id}


def test_seeds_of_one_configuration_are_one_group(store: Any) -> None:
    runs = [(make_seed(seed), HEALTHY) for seed in range(3)]
    runs += [(make_seed(seed, option="a"), COLLAPSED) for seed in range(3)]
    groups = {group.arm: group for group in store(runs).groups}
    assert (groups["b"].num_passed, groups["b"].num_judged) == (3, 3)
    assert (groups["a"].num_passed, groups["a"].num_judged) == (0, 3)
    assert groups["b"].jobs == [job.id for job, _ in runs[:3]]


def test_group_that_passes_more_often_is_kept_and_the_other_ruled_out(store: Any) -> None:
    runs = [(make_seed(seed), HEALTHY) for seed in range(10)]
    runs += [(make_seed(seed, option="a"), COLLAPSED) for seed in range(10)]
    comparison = store(runs)
    recommendation = comparison.recommendation
    assert recommendation.state == DecisionState.decided
    assert (recommendation.arm, recommendation.option) == ("b", "b")
    assert recommendation.more_seeds == 0
    assert [entry.arm for entry in recommendation.ruled_out] == ["a"]
    assert recommendation.job_id in {job.id for job, _ in runs[:10]}
    assert "b escapes collapse, 10 of 10; a is ruled out" in comparison.reason


def test_single_runs_cannot_decide_and_say_how_many_seeds_might(store: Any) -> None:
    comparison = store([(make_seed(0), HEALTHY), (make_seed(0, option="a"), COLLAPSED)])
    recommendation = comparison.recommendation
    assert recommendation.state == DecisionState.undecided
    assert recommendation.arm is None
    assert recommendation.option == "b"
    assert recommendation.more_seeds > 0
    assert "one run of each cannot decide" in recommendation.reason


def test_without_a_run_that_passed_there_is_no_recommendation(store: Any) -> None:
    comparison = store([(make_seed(seed, option="a"), COLLAPSED) for seed in range(3)])
    assert comparison.recommendation is None
    assert comparison.decision.state == DecisionState.none


def test_other_thresholds_judge_groups_again(store: Any) -> None:
    runs = [(make_seed(seed), HEALTHY) for seed in range(5)]
    assert store(runs, min_kl_per_dimension=100).groups[0].num_passed == 0


def test_divergence_counts_against_a_group_and_a_lost_machine_does_not(store: Any) -> None:
    failed = {"status": JobStatus.failed, "error_code": "x"}
    numeric = make_seed(1, failure_kind=FailureKind.numeric, **failed)
    lost = make_seed(2, failure_kind=FailureKind.infrastructure, **failed)
    group = store([(make_seed(0), HEALTHY), (numeric, HEALTHY), (lost, HEALTHY)]).groups[0]
    assert (group.num_passed, group.num_judged, group.num_missing) == (1, 2, 1)


def test_same_seed_twice_counts_once(store: Any) -> None:
    again = make_seed(0, status=JobStatus.succeeded)
    again.id = "e" * 12
    assert store([(make_seed(0), HEALTHY), (again, HEALTHY)]).groups[0].num_judged == 1


def test_repeat_that_was_cancelled_does_not_take_the_place_of_a_judged_run(store: Any) -> None:
    again = make_seed(0, status=JobStatus.cancelled)
    again.id = "e" * 12
    runs = [(make_seed(seed), HEALTHY) for seed in range(3)]
    (group,) = store([*runs, (again, [])]).groups
    assert (group.num_passed, group.num_judged, group.num_missing) == (3, 3, 0)


def test_runs_of_one_seed_on_other_data_count_each(store: Any) -> None:
    runs = [(make_seed(seed), COLLAPSED) for seed in range(3)]
    for seed in range(3):
        job = make_seed(seed, settings={"data_seed": 99})
        job.id = f"other{seed}" + "0" * 6
        runs.append((job, HEALTHY))
    (group,) = store(runs).groups
    assert (group.num_passed, group.num_judged) == (3, 6)


def test_groups_of_one_option_are_named_by_what_differs(store: Any) -> None:
    jobs = [make_seed(0, settings={"beta": beta}) for beta in (0.5, 1.0)]
    for job, letter in zip(jobs, "de", strict=True):
        job.id, job.config_sha256 = letter * 12, letter * 64
    groups = store([(job, HEALTHY) for job in jobs]).groups
    assert [group.arm for group in groups] == ["b beta=0.5", "b beta=1.0"]


@pytest.fixture(scope="module")
def trained(make_settings: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with two seeds of option b and one of option a."""
    settings: Settings = make_settings(tmp_path_factory.mktemp("groups"))
    app: FastAPI = create_app(settings)
    with open_client(app) as client:
        for body in ({"option": "b", "seed": 1}, {"option": "b", "seed": 2}, {"option": "a"}):
            assert client.post("/jobs", json=TINY | body).status_code == 201
        drain(settings, app.state.engine)
        yield client


def test_options_are_compared_by_all_jobs_of_their_configuration(trained: TestClient) -> None:
    answer = trained.get("/comparisons", params={"options": "a,b", **LENIENT}).json()
    assert [entry["job"]["option"] for entry in answer["jobs"]] == ["a", "b"]
    groups = {group["arm"]: group for group in answer["groups"]}
    assert (groups["a"]["num_passed"], groups["a"]["num_judged"]) == (1, 1)
    assert (groups["b"]["num_passed"], groups["b"]["num_judged"]) == (1, 2)
    assert answer["recommendation"]["state"] == "undecided"
    assert answer["recommendation"]["reason"].startswith("nothing is decided")
    assert "data_seed" not in answer["differences"]
    assert answer["decision"]["kept"] == ["a", "b"]


@pytest.mark.parametrize(
    "path", ["/ui/compare", "/comparisons/report.html", "/comparisons/report.md"]
)
def test_groups_are_on_page_and_reports(trained: TestClient, path: str) -> None:
    page = trained.get(path, params={"options": "a,b", **LENIENT}).text
    assert "1 of 2" in page
    assert "nothing is decided" in page


def test_single_runs_have_no_table_of_groups(trained: TestClient) -> None:
    ids = [job["id"] for job in trained.get("/jobs").json()["data"]][:2]
    page = trained.get("/ui/compare", params={"job_id": ids}).text
    assert 'id="groups"' not in page


def test_options_of_one_configuration_are_one_group(trained: TestClient) -> None:
    config = trained.get("/options/b").json()["config"]
    trained.put("/options/b_again", json={"base": "b"}).raise_for_status()
    job = trained.get("/jobs", params={"option": "b"}).json()["data"][0]
    assert config["beta"] == job["config"]["beta"]
    body = TINY | {"option": "b_again", "seed": 3}
    trained.post("/jobs", json=body).raise_for_status()
    drain(trained.app.state.settings, trained.app.state.engine)
    answer = trained.get("/comparisons", params={"options": "b,b_again,a", **LENIENT}).json()
    assert [entry["job"]["option"] for entry in answer["jobs"]] == ["b", "b_again", "a"]
    assert sorted(len(group["jobs"]) for group in answer["groups"]) == [1, 3]
