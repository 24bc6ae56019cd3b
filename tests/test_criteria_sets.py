"""Jobs, comparisons and studies are judged by the set of criteria that is asked for."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from artificial_runs import MEASURED
from conftest import BOTH_DATABASES, problem
from fastapi.testclient import TestClient
from sqlalchemy import Engine, update
from sqlmodel import Session, col
from study_results import PASSING, end_seeds, post, read, read_job_ids

from server.jobs.admission import Admission
from server.judging.criteria import CriteriaSet, list_criteria
from server.judging.studies import ResultCache, judge_study
from server.judging.verdicts import VerdictCache
from server.models.epochs import EpochMetrics
from server.models.studies import Study
from server.models.tables import Job, JobStatus
from server.races import advance_races

pytestmark = BOTH_DATABASES

SPEC, EVIDENCE = list(CriteriaSet)
#: Of a study, by its id.
STUDY_PATHS = ("", "/report.html", "/report.md", "/curves.png", "/jobs.csv")
COMPARISON_PATHS = ("", "/report.html", "/report.md", "/curves.png")


def change_epochs(engine: Engine, study_id: str, arm: int, values: dict[str, Any]) -> None:
    """Let the epochs of all jobs of an arm have other values."""
    job_ids = read_job_ids(engine, study_id, arm)
    rows = update(EpochMetrics).where(col(EpochMetrics.job_id).in_(job_ids))
    with engine.begin() as connection:
        connection.execute(rows.values(values))


@pytest.fixture
def study_id(client: TestClient, engine: Engine) -> str:
    """A study whose arms both paint as they should, while a knows nothing of colours."""
    study_id: str = post(client)["id"]
    end_seeds(engine, study_id, {"a": "ppppp", "b": "ppppp"})
    change_epochs(engine, study_id, 0, {"val_colour_ap": 0.001})
    return study_id


def list_names(answer: dict[str, Any]) -> list[str]:
    return [each["name"] for each in answer["criteria"]]


def test_verdict_is_by_the_set_of_the_query(
    client: TestClient, engine: Engine, study_id: str
) -> None:
    job_id, _ = read_job_ids(engine, study_id, 0)[:2]
    by_default = client.get(f"/jobs/{job_id}/verdict").json()
    assert (by_default["criteria_set"], by_default["outcome"]) == ("spec", "success")
    for criteria_set, outcome in ((SPEC, "success"), (EVIDENCE, "failure")):
        verdict = client.get(f"/jobs/{job_id}/verdict", params={"criteria": criteria_set}).json()
        assert (verdict["criteria_set"], verdict["outcome"]) == (criteria_set, outcome)
        assert list_names(verdict) == list_criteria(criteria_set)


def test_thresholds_and_criteria_go_together(
    client: TestClient, engine: Engine, study_id: str
) -> None:
    job_id = read_job_ids(engine, study_id, 1)[0]
    query = {"criteria": "evidence", "min_colour_ap_ratio": 100, "min_accuracy": 0.85}
    verdict = client.get(f"/jobs/{job_id}/verdict", params=query).json()
    failed = [each["name"] for each in verdict["criteria"] if each["status"] == "failed"]
    assert failed == ["knows_colours"]


@pytest.mark.parametrize("value", ["SPEC", "both", ""])
def test_unknown_set_is_refused_with_what_is_allowed(
    client: TestClient, engine: Engine, study_id: str, value: str
) -> None:
    job_id = read_job_ids(engine, study_id, 0)[0]
    queries = {f"/jobs/{job_id}/verdict": {}}
    queries |= {f"/studies/{study_id}{path}": {} for path in STUDY_PATHS}
    queries |= {f"/comparisons{path}": {"job_id": job_id} for path in COMPARISON_PATHS}
    for path, query in queries.items():
        answer = client.get(path, params={"criteria": value, **query})
        (error,) = problem(answer, 422)["errors"]
        assert error["field"] == "criteria"
        assert "'spec' or 'evidence'" in error["message"]
    for page in (f"/ui/studies/{study_id}", f"/ui/compare?job_id={job_id}"):
        assert client.get(page, params={"criteria": value, "job_id": job_id}).status_code == 422
    answer = client.post("/studies", json={"options": ["a"], "criteria": value})
    (error,) = problem(answer, 422)["errors"]
    assert error["field"] == "criteria"


def test_comparison_is_by_the_set_of_the_query(
    client: TestClient, engine: Engine, study_id: str
) -> None:
    (first, *_), (second, *_) = (read_job_ids(engine, study_id, arm) for arm in (0, 1))
    change_epochs(engine, study_id, 0, {"val_foreground_iou": 0.9})
    for criteria_set, ranking in ((SPEC, [first, second]), (EVIDENCE, [second, first])):
        query = {"job_id": [first, second], "criteria": criteria_set}
        answer = client.get("/comparisons", params=query).json()
        assert (answer["criteria_set"], answer["ranking"]) == (criteria_set, ranking)
        for entry in answer["jobs"]:
            assert entry["verdict"]["criteria_set"] == criteria_set
        for group in answer["groups"]:
            assert list_names(group) == list_criteria(criteria_set)


@pytest.mark.parametrize(
    "path", ["/ui/compare", "/comparisons/report.html", "/comparisons/report.md"]
)
def test_pages_and_reports_of_a_comparison_show_the_criteria_of_its_set(
    client: TestClient, engine: Engine, study_id: str, path: str
) -> None:
    job_ids = [read_job_ids(engine, study_id, arm)[0] for arm in (0, 1)]
    for criteria_set, other in ((SPEC, EVIDENCE), (EVIDENCE, SPEC)):
        query = {"job_id": job_ids, "criteria": criteria_set}
        page = client.get(path, params=query).raise_for_status().text.replace("_", " ")
        own = [name.replace("_", " ") for name in list_criteria(criteria_set)]
        foreign = [name.replace("_", " ") for name in list_criteria(other)[:4]]
        assert [name for name in own if name not in page.replace("\\", "")] == []
        assert [name for name in foreign if f">{name}<" in page and name not in own] == []


def test_exports_of_the_comparison_page_keep_its_set(
    client: TestClient, engine: Engine, study_id: str
) -> None:
    job_id = read_job_ids(engine, study_id, 0)[0]
    page = client.get("/ui/compare", params={"job_id": job_id, "criteria": "evidence"}).text
    assert f"/comparisons/report.html?job_id={job_id}&amp;criteria=evidence" in page
    assert "criteria=" not in client.get("/ui/compare", params={"job_id": job_id}).text


# -- studies


def test_study_decides_by_the_criteria_of_its_request(client: TestClient, engine: Engine) -> None:
    study = post(client, criteria="evidence")
    assert study["criteria_set"] == "evidence"
    end_seeds(engine, study["id"], {"a": "ppppp", "b": "ppppp"})
    change_epochs(engine, study["id"], 0, {"val_colour_ap": 0.001})
    found = read(client, study)
    assert found["criteria_set"] == "evidence"
    assert [arm["num_passed"] for arm in found["arms"]] == [0, 5]
    assert found["recommendation"]["reason"].startswith("b passes by evidence, 5 of 5; a is ruled")
    assert found["arms"][0]["diagnoses"] == {"under_informed": 5}
    assert client.get("/studies").json()["data"][0]["criteria_set"] == "evidence"


def test_query_judges_a_study_by_the_other_set_and_changes_nothing(
    client: TestClient, study_id: str
) -> None:
    before = read(client, study_id)
    assert (before["criteria_set"], before["recommendation"]["state"]) == ("spec", "undecided")
    other = read(client, study_id, criteria="evidence")
    assert (other["criteria_set"], other["recommendation"]["arm"]) == ("evidence", "b")
    for answer, criteria_set in ((before, SPEC), (other, EVIDENCE)):
        for arm in answer["arms"]:
            assert list_names(arm) == list_criteria(criteria_set)
    assert read(client, study_id) == before
    assert read(client, study_id, criteria="spec") == before


@pytest.mark.parametrize("criteria_set", CriteriaSet)
def test_race_ends_by_the_criteria_of_its_request(
    client: TestClient, engine: Engine, criteria_set: str
) -> None:
    study = post(client, until_decided=True, max_seeds=10, criteria=criteria_set)
    end_seeds(engine, study["id"], {"a": "ppppp", "b": "ppppp"})
    change_epochs(engine, study["id"], 0, {"val_colour_ap": 0.001})
    advance_races(engine, cache=ResultCache(), admission=Admission(Path(), 100))
    found = read(client, study)
    is_decided = criteria_set == EVIDENCE
    assert (found["recommendation"]["state"] == "decided") == is_decided
    assert (found["status"] == JobStatus.succeeded) == is_decided, "else the next look is queued"
    assert found["num_jobs"] == (10 if is_decided else 20)


@pytest.mark.parametrize("path", STUDY_PATHS)
@pytest.mark.parametrize("criteria_set", CriteriaSet)
def test_every_form_of_a_study_can_be_had_by_either_set(
    client: TestClient, study_id: str, path: str, criteria_set: str
) -> None:
    answer = client.get(f"/studies/{study_id}{path}", params={"criteria": criteria_set})
    assert answer.status_code == 200, answer.text


def test_table_of_jobs_has_the_criteria_of_the_set(client: TestClient, study_id: str) -> None:
    for criteria_set, other in ((SPEC, EVIDENCE), (EVIDENCE, SPEC)):
        table = client.get(f"/studies/{study_id}/jobs.csv", params={"criteria": criteria_set}).text
        rows = list(csv.DictReader(io.StringIO(table)))
        assert all(rows[0][name] == "passed" for name in list_criteria(criteria_set)[-3:])
        assert not set(list_criteria(other)[:3]) & rows[0].keys()
        assert [row["has_passed"] for row in rows] == (
            ["true"] * 10 if criteria_set == SPEC else ["false"] * 5 + ["true"] * 5
        )


def test_report_names_the_set_and_its_criteria(client: TestClient, study_id: str) -> None:
    by_evidence = client.get(f"/studies/{study_id}/report.md", params={"criteria": "evidence"}).text
    assert "every criterion of the set evidence: informative (mutual" in by_evidence
    assert "These criteria are not those of the study itself." in by_evidence
    assert "ELBO surgery" in by_evidence
    own = client.get(f"/studies/{study_id}/report.md").text
    assert "every criterion of the set spec: accuracy_in_range" in own.replace("\\", "")
    assert "not those of the study itself" not in own


def test_study_page_says_by_which_criteria_it_judges(client: TestClient, study_id: str) -> None:
    page = client.get(f"/ui/studies/{study_id}", params={"criteria": "evidence"}).text
    assert "Judged otherwise: criteria evidence." in page
    assert f"/studies/{study_id}/report.html?criteria=evidence" in page
    assert "knows colours" in page
    own = client.get(f"/ui/studies/{study_id}").text
    assert "Judged otherwise" not in own
    assert "criteria=" not in own


# -- caches


def test_results_of_one_set_are_never_taken_for_those_of_the_other(
    engine: Engine, study_id: str
) -> None:
    cache = ResultCache()
    with Session(engine) as session:
        study = session.get_one(Study, study_id)
        for _ in range(2):
            passed = {
                each: [arm.num_passed for arm in judge_study(
                    session, study, criteria_set=each, cache=cache).arms]
                for each in CriteriaSet
            }  # fmt: skip
            assert passed == {SPEC: [5, 5], EVIDENCE: [0, 5]}


def test_verdicts_of_one_set_are_never_taken_for_those_of_the_other(
    engine: Engine, study_id: str
) -> None:
    cache = VerdictCache()
    with Session(engine) as session:
        job = session.get_one(Job, read_job_ids(engine, study_id, 0)[0])
        for _ in range(2):
            for criteria_set in CriteriaSet:
                verdicts = cache.judge_all(session, [job], criteria_set=criteria_set)
                assert verdicts[job.id].criteria_set == criteria_set


# -- studies from before there were measures


def test_old_study_is_undecided_by_evidence_and_nowhere_an_error(
    client: TestClient, engine: Engine
) -> None:
    study_id = post(client)["id"]
    end_seeds(engine, study_id, PASSING)
    for arm in (0, 1):
        change_epochs(engine, study_id, arm, dict.fromkeys(MEASURED))
    found = read(client, study_id, criteria="evidence")
    assert [arm["num_passed"] for arm in found["arms"]] == [0, 0]
    assert [arm["diagnoses"] for arm in found["arms"]] == [{"undecided": 5}] * 2
    judged = {each["name"]: each["num_judged"] for each in found["arms"][1]["criteria"]}
    assert (judged["informative"], judged["generalises"], judged["stable"]) == (0, 5, 5)
    assert found["arms"][1]["metrics"]["val_mutual_information"]["median"] is None
    for path in STUDY_PATHS:
        client.get(f"/studies/{study_id}{path}", params={"criteria": "evidence"}).raise_for_status()
    client.get(f"/ui/studies/{study_id}", params={"criteria": "evidence"}).raise_for_status()
    own = read(client, study_id)
    assert own["recommendation"]["arm"] == "b"
    assert own["arms"][0]["diagnoses"] == {"mode_collapse": 5}
