"""The client against a real server on a free port."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.cli.processes import ServerThread
from server.client import LosslabClient, RequestError, UnreachableError
from server.errors import BAD_INPUT, FAILED
from server.settings import Settings
from server.study_client import StudyReportFormat

TINY = {"num_samples": 200, "epochs": 1}


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without a worker, so that jobs stay queued."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("client"), port=0)
    server = ServerThread(settings, log_level="warning")
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
def http(server_url: str) -> Iterator[LosslabClient]:
    with LosslabClient(server_url) as client:
        yield client


def test_answers_on_a_kept_connection_wait_for_nothing(server_url: str) -> None:
    """A client acknowledges late once it has asked several times on one connection."""

    def ask(client: httpx.Client) -> float:
        begin = time.perf_counter()
        client.get("/jobs").raise_for_status()
        return time.perf_counter() - begin

    def ask_on_a_new_connection() -> float:
        with httpx.Client(base_url=server_url, trust_env=False) as client:
            return ask(client)

    with httpx.Client(base_url=server_url, trust_env=False) as client:
        kept = statistics.median([ask(client) for _ in range(40)][-20:])
    assert kept < 3 * statistics.median(ask_on_a_new_connection() for _ in range(20))


def test_job_is_created_listed_cancelled_and_deleted(http: LosslabClient) -> None:
    job = http.create_job("b", quick_test=True, name="mine", metadata={"k": "v"}, **TINY)
    assert job["config"]["epochs"] == 1
    assert job["metadata"] == {"k": "v"}
    page = http.list_jobs(status="queued", option="b", name="mine", limit=5)
    assert [entry["id"] for entry in page["data"]] == [job["id"]]
    assert http.read_job(job["id"])["status"] == "queued"
    assert http.cancel_job(job["id"])["status"] == "cancelled"
    assert http.wait(job["id"])["status"] == "cancelled"
    http.delete_job(job["id"])
    assert http.list_jobs(name="mine") == {"data": [], "has_more": False}


def test_job_without_epochs_has_empty_results(http: LosslabClient) -> None:
    job_id = http.create_job("a", **TINY)["id"]
    assert http.read_metrics(job_id)["data"] == []
    assert http.list_reconstructions(job_id)["data"] == []
    assert http.read_log(job_id, tail=5) == ""
    assert http.read_verdict(job_id)["outcome"] == "undecided"
    with pytest.raises(RequestError, match="no reconstruction"):
        http.read_reconstruction(job_id, "best")


def test_jobs_are_judged_by_the_criteria_that_are_given(http: LosslabClient) -> None:
    job_id = http.create_job("a", **TINY)["id"]
    assert http.read_verdict(job_id)["criteria_set"] == "spec"
    assert http.read_verdict(job_id, "evidence")["criteria_set"] == "evidence"
    assert http.compare([job_id], criteria="evidence")["criteria_set"] == "evidence"
    report = http.download_report([job_id], criteria="evidence", format="md").decode()
    assert "informative" in report
    with pytest.raises(RequestError, match="'spec' or 'evidence'") as caught:
        http.read_verdict(job_id, "both")  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.exit_code) == (422, BAD_INPUT)


def test_study_is_judged_by_its_criteria_unless_others_are_given(http: LosslabClient) -> None:
    study_id = http.create_study(["a"], num_seeds=1, criteria="evidence", config=TINY)["id"]
    assert http.read_study(study_id)["criteria_set"] == "evidence"
    assert http.read_study(study_id, "spec")["criteria_set"] == "spec"
    table = http.download_study_report(study_id, "jobs", "spec").decode()
    assert "accuracy_in_range" in table and "informative" not in table
    assert "knows_colours" in http.download_study_report(study_id, "jobs").decode()
    epochs = http.download_study_report(study_id, "metrics", "spec").decode()
    assert epochs.startswith("arm,seed,job_id")


def test_options_and_health(http: LosslabClient) -> None:
    assert [entry["option"] for entry in http.list_options()["data"]] == ["a", "b", "c"]
    assert http.is_healthy()


def test_option_is_added_read_and_deleted(http: LosslabClient) -> None:
    added = http.add_option("b_soft", "b", {"free_bits": 0.1}, summary="b with free bits")
    assert http.read_option("b_soft") == added
    assert http.add_option("b_soft", "b", {"free_bits": 0.1}) == added
    with pytest.raises(RequestError) as caught:
        http.add_option("b_soft", "b")
    assert (caught.value.status, caught.value.exit_code) == (409, FAILED)
    assert http.create_job("b_soft", **TINY)["config"]["free_bits"] == 0.1
    http.delete_option("b_soft")
    with pytest.raises(RequestError) as caught:
        http.read_option("b_soft")
    assert caught.value.status == 404
    with pytest.raises(RequestError) as caught:
        http.create_job("b_soft", **TINY)
    assert (caught.value.status, caught.value.exit_code) == (422, BAD_INPUT)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../jobs", "a b", "%00", "é", "a?b"])
def test_name_of_an_option_is_no_path(http: LosslabClient, name: str) -> None:
    for change in (lambda: http.add_option(name, "b"), lambda: http.delete_option(name)):
        with pytest.raises(RequestError) as caught:
            change()
        assert caught.value.status in (404, 422)


def test_refused_field_is_named_once(http: LosslabClient) -> None:
    with pytest.raises(RequestError) as caught:
        http.create_job("b", epochs=-1, wrong=2)
    assert caught.value.status == 422
    assert {error["field"] for error in caught.value.problem["errors"]} == {"epochs", "wrong"}
    assert str(caught.value).count("epochs") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("job_id", ["000000000000", "..", "../options", "a/b", "%00", "é"])
def test_unknown_job_is_refused(http: LosslabClient, job_id: str) -> None:
    with pytest.raises(RequestError) as caught:
        http.read_job(job_id)
    assert caught.value.status == 404


def test_nan_is_refused_before_it_is_sent(http: LosslabClient) -> None:
    with pytest.raises(RequestError, match="Invalid input"):
        http.create_job("b", learning_rate=float("nan"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://127.0.0.1", "http://[", "nonsense"])
def test_silent_url_is_named_with_a_way_out(url: str) -> None:
    with pytest.raises(UnreachableError) as caught, LosslabClient(url) as client:
        client.list_jobs()
    assert url in str(caught.value)
    assert "losslab up" in str(caught.value)
    assert caught.value.status == 0


def test_foreign_service_is_told_apart() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))
    with LosslabClient(transport=transport) as client, pytest.raises(RequestError) as caught:
        client.list_jobs()
    assert "something else" in str(caught.value)


def test_error_that_is_no_problem_document_is_described() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(502, text="<html>"))
    with LosslabClient(transport=transport) as client, pytest.raises(RequestError) as caught:
        client.list_jobs()
    assert "Bad Gateway" in str(caught.value)
    with LosslabClient(transport=transport) as client:
        assert not client.is_healthy()


def test_token_is_sent_as_bearer() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"got": request.headers["Authorization"]})

    with LosslabClient(token="secret", transport=httpx.MockTransport(answer)) as client:
        assert client.list_options() == {"got": "Bearer secret"}


def test_wait_outlasts_a_short_silence() -> None:
    answers = iter([None, {"status": "running"}, None, {"status": "succeeded"}])

    def answer(request: httpx.Request) -> httpx.Response:
        job = next(answers)
        if job is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, json=job)

    seen = []
    with LosslabClient(transport=httpx.MockTransport(answer)) as client:
        job = client.wait(
            "0" * 12, poll_seconds=0, on_update=lambda job: seen.append(job["status"])
        )
    assert job["status"] == "succeeded"
    assert seen == ["running", "succeeded"]


def test_wait_gives_up_on_a_long_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.connection.RETRY_SECONDS", 0.05)
    with LosslabClient("http://127.0.0.1:9") as client, pytest.raises(UnreachableError):
        client.wait("0" * 12, poll_seconds=0.01)


def test_report_is_downloaded(tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=str(request.url)))
    with LosslabClient("http://localhost", transport=transport) as client:
        by_id = client.download_report(["x", "y"], format="md").decode()
        by_option = client.download_report(options=["a", "b"]).decode()
        curves = client.download_report(["x"], format="curves").decode()
    assert by_id == "http://localhost/comparisons/report.md?job_id=x&job_id=y"
    assert by_option.replace("%2C", ",") == "http://localhost/comparisons/report.html?options=a,b"
    assert curves == "http://localhost/comparisons/curves.png?job_id=x"


def test_study_is_planned_created_steered_and_deleted(http: LosslabClient) -> None:
    plan = http.plan_study(["b"], grid={"beta": [0.5, 1]}, num_seeds=2, config=TINY)
    assert [arm["arm"] for arm in plan["arms"]] == ["b beta=0.5", "b beta=1"]
    study = http.create_study(
        ["a", {"name": "mine", "base": "b", "config": {"beta": 2}}],
        seeds=[3, 4],
        config=TINY,
        quick_test=True,
        name="both",
        metadata={"k": "v"},
        thresholds={"min_accuracy": 0.5},
        priority=1,
    )
    assert (study["num_jobs"], study["seeds"], study["metadata"]) == (4, [3, 4], {"k": "v"})
    assert http.list_studies(limit=1)["data"][0]["id"] == study["id"]
    assert http.pause_study(study["id"])["status"] == "paused"
    assert http.wait_study(study["id"])["status"] == "paused"
    assert http.resume_study(study["id"])["status"] == "queued"
    assert http.add_seeds(study["id"], 1)["seeds"] == [3, 4, 0]
    assert http.cancel_study(study["id"])["status"] == "cancelled"
    assert http.read_study(study["id"])["num_by_status"] == {"cancelled": 6}
    deleted = http.delete_study(study["id"], keep_jobs=True)
    assert (deleted["num_jobs_deleted"], deleted["num_jobs_kept"]) == (0, 6)


def test_study_with_a_key_is_created_once(http: LosslabClient) -> None:
    first = http.create_study(["a"], num_seeds=1, config=TINY, idempotency_key="once")
    again = http.create_study(["a"], num_seeds=1, config=TINY, idempotency_key="once")
    assert first["id"] == again["id"]
    with pytest.raises(RequestError, match="Idempotency-Key"):
        http.create_study(["b"], num_seeds=1, config=TINY, idempotency_key="once")


@pytest.mark.parametrize("study_id", ["000000000000", "..", "../options", "a/b", "%00", "é"])
def test_unknown_study_is_refused(http: LosslabClient, study_id: str) -> None:
    with pytest.raises(RequestError) as caught:
        http.read_study(study_id)
    assert caught.value.status == 404


def test_zero_seeds_are_refused_and_not_left_out(http: LosslabClient) -> None:
    with pytest.raises(RequestError, match="num_seeds"):
        http.create_study(["a"], num_seeds=0)


@pytest.mark.parametrize(
    ("format", "name"),
    [("html", "report.html"), ("md", "report.md"), ("curves", "curves.png"),
     ("jobs", "jobs.csv"), ("metrics", "metrics.csv")],
)  # fmt: skip
def test_report_of_a_study_is_downloaded(format: StudyReportFormat, name: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=str(request.url)))
    with LosslabClient("http://localhost", transport=transport) as client:
        address = client.download_study_report("x/y", format).decode()
    assert address == f"http://localhost/studies/x%2Fy/{name}"


def test_waiting_for_a_race_goes_on_between_its_looks() -> None:
    answers = iter(["queued", "running", "running", "succeeded"])

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"status": next(answers)})

    seen = []
    with LosslabClient(transport=httpx.MockTransport(answer)) as client:
        client.wait_study("0" * 12, poll_seconds=0, on_update=lambda s: seen.append(s["status"]))
    assert seen == ["queued", "running", "running", "succeeded"]
