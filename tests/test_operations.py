"""Metrics, readiness, rate limits, logs and settings of the service."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forks
import httpx
import pytest
from conftest import BOTH_DATABASES, TINY, SubmitJob, open_client, problem
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from service import Service
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select
from starlette.requests import Request
from study_results import end_seeds, post

from server import logs
from server.api.rates import MAX_CLIENTS, Rate, RateCounter, find_client
from server.cli.processes import worker_environment
from server.database.engine import write_transaction
from server.jobs import queue
from server.jobs.leases import Lease
from server.main import create_app
from server.models.options import BuiltInOption
from server.models.studies import StudyJob
from server.models.tables import FailureKind, Job, JobStatus
from server.settings import Settings
from server.tokens import ApiToken, TokenScope
from worker.main import work

SECRET = "a-long-and-secret-token"


@contextmanager
def serve(settings: Settings, **changes: object) -> Iterator[TestClient]:
    with open_client(create_app(settings.model_copy(update=changes))) as client:
        yield client


def read_metrics(client: TestClient) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples by name and the values of their labels."""
    answer = client.get("/metrics").raise_for_status()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


# -- metrics


@BOTH_DATABASES
def test_metrics_count_jobs_and_the_queue(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    assert read_metrics(client)["losslab_queue_oldest_seconds"] == {(): 0.0}
    for _ in range(3):
        submit_job()
    queue.cancel(engine, submit_job().id)
    metrics = read_metrics(client)
    jobs = metrics["losslab_jobs"]
    assert (jobs["queued",], jobs["cancelled",], jobs["running",]) == (3, 1, 0)
    assert set(jobs) == {(status,) for status in JobStatus}
    assert metrics["losslab_queue_depth"] == {(): 3}
    assert 0 < metrics["losslab_queue_oldest_seconds"][()] < 60


@BOTH_DATABASES
def test_metrics_tell_of_failures_and_of_requeues(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    for kind in (FailureKind.numeric, FailureKind.numeric, FailureKind.user):
        submit_job()
        job = queue.claim(engine, worker_id="w1", lease_seconds=30)
        assert job is not None
        lease = Lease(job.id, job.attempt, "w1")
        queue.hand_back(engine, lease, reason="worker was stopped")
        job = queue.claim(engine, worker_id="w1", lease_seconds=30)
        assert job is not None
        lease = Lease(job.id, job.attempt, "w1")
        queue.fail(engine, lease, code="x", message="because", kind=kind)
    metrics = read_metrics(client)
    assert metrics["losslab_failed_jobs"] == {("numeric",): 2, ("user",): 1}
    assert metrics["losslab_requeues"] == {(): 3}


@BOTH_DATABASES
def test_metrics_follow_a_worker_and_its_newest_epoch(
    client: TestClient, engine: Engine, settings: Settings, submit_job: SubmitJob
) -> None:
    submit_job(epochs=500)
    settings.heartbeat_seconds = 0.1
    shutdown = threading.Event()
    worker = threading.Thread(
        target=work, args=(settings,), kwargs={"engine": engine, "shutdown": shutdown}
    )
    worker.start()
    try:
        while not (metrics := read_metrics(client)).get("losslab_epoch_seconds"):
            time.sleep(0.05)
    finally:
        shutdown.set()
        worker.join()
    ((worker_id,),) = metrics["losslab_worker_heartbeat_age_seconds"]
    assert 0 <= metrics["losslab_worker_heartbeat_age_seconds"][worker_id,] < 60
    assert metrics["losslab_epoch_seconds"][worker_id,] > 0
    assert metrics["losslab_grids_per_second"][worker_id,] > 0


def test_latency_is_counted_by_route_and_never_by_address(client: TestClient) -> None:
    for path in ("/jobs/000000000001", "/jobs/000000000002", "/nowhere/1", "/nowhere/2"):
        client.get(path)
    counts = read_metrics(client)["losslab_request_seconds_count"]
    assert counts["GET", "/jobs/{job_id}", "404"] == 2
    assert counts["GET", "none", "404"] == 2
    assert not [labels for labels in counts if "0001" in str(labels) or "nowhere" in str(labels)]


def test_methods_that_a_client_invents_share_one_label(client: TestClient) -> None:
    for number in range(5):
        client.request(f"BREW{number}", "/jobs")
    counts = read_metrics(client)["losslab_request_seconds_count"]
    assert [labels for labels in counts if labels[0] not in ("GET", "other")] == []
    assert sum(count for labels, count in counts.items() if labels[0] == "other") == 5


# -- readiness


def test_service_is_ready_without_a_worker_and_says_so(client: TestClient) -> None:
    answer = client.get("/readyz").raise_for_status().json()
    assert answer == {"status": "ready", "database": True, "disk": True, "num_workers": 0}


def test_lost_disk_makes_the_service_not_ready(client: TestClient, settings: Settings) -> None:
    shutil.move(settings.data_dir, settings.data_dir.with_name("elsewhere"))
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["disk"]) == (503, False)
    assert client.get("/healthz").status_code == 200


def test_lost_database_makes_the_service_not_ready(app: FastAPI, client: TestClient) -> None:
    app.state.engine.dispose()
    app.state.engine = create_engine("sqlite:////nowhere/losslab.db")
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["database"]) == (503, False)
    assert client.get("/jobs").status_code == 503


def test_answer_that_takes_too_long_says_that_the_request_may_still_be_carried_out(
    settings: Settings, engine: Engine
) -> None:
    with serve(settings, request_seconds=1.0) as client, write_transaction(engine):
        refused = problem(client.post("/jobs", json={"option": "b"}), 503)
        assert "may have been carried out" in refused["detail"]
        assert "Idempotency-Key" in refused["detail"]


def test_request_that_the_database_refused_says_that_it_was_not_carried_out(
    client: TestClient, app: FastAPI
) -> None:
    app.state.engine.dispose()
    app.state.engine = create_engine("sqlite:////nowhere/losslab.db")
    refused = problem(client.post("/jobs", json={"option": "b"}), 503)
    assert "not carried out" in refused["detail"]
    assert "Idempotency-Key" in refused["detail"]
    assert "Idempotency-Key" not in problem(client.get("/jobs"), 503)["detail"]


def test_answer_that_fails_after_the_change_says_that_it_may_have_been_made(
    client: TestClient, engine: Engine
) -> None:
    study = post(client, num_seeds=2)
    end_seeds(engine, study["id"], {"a": "pp", "b": "pp"})
    with engine.begin() as connection:  # read for the answer alone
        connection.exec_driver_sql("ALTER TABLE epoch_metrics RENAME TO away")
    refused = problem(client.post(f"/studies/{study['id']}/seeds", json={"num": 1}), 503)
    assert "may have been carried out" in refused["detail"]
    with Session(engine) as session:
        assert len(session.exec(select(StudyJob)).all()) == 6


def test_folder_that_cannot_be_written_is_no_fault_of_the_program(
    client: TestClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.datasets_dir.mkdir()
    with read_only(settings.datasets_dir):
        answer = client.put("/datasets/mine", content=b"x")
    detail = problem(answer, 503)["detail"]
    assert "mount that writable" in detail
    assert "nothing was stored" in detail
    assert str(settings.datasets_dir) in caplog.text


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Mounted so that not even root may write to it."""
    for arguments in (["--bind", str(path), str(path)], ["-o", "remount,bind,ro", str(path)]):
        mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


# -- rates


def test_too_many_requests_are_answered_with_retry_after(settings: Settings) -> None:
    with serve(settings, rate_limit="5/hour") as client:
        answers = [client.get("/jobs") for _ in range(7)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 3600
        assert "LOSSLAB_RATE_LIMIT" in answers[-1].json()["detail"]
        assert client.get("/healthz").status_code == 200


def test_client_that_never_stops_asking_gets_its_rate_and_no_more() -> None:
    now = 1000.0
    counter = RateCounter(Rate.parse("60/minute"), clock=lambda: now)
    num_allowed, num_minutes = 0, 10
    while now < 1000.0 + 60 * num_minutes:
        num_allowed += counter.hit("anna") == 0
        now += 0.1
    assert 60 * (num_minutes - 1) <= num_allowed <= 60 * (num_minutes + 1)
    assert counter.hit("another") == 0


def test_client_that_waits_as_long_as_it_was_told_is_allowed() -> None:
    now = 0.0
    counter = RateCounter(Rate.parse("3/minute"), clock=lambda: now)
    for _ in range(20):
        if wait_seconds := counter.hit("anna"):
            now += wait_seconds + 0.001
            assert counter.hit("anna") == 0
        now += 1.0


def test_more_clients_than_are_counted_forget_only_who_was_silent_for_longest() -> None:
    counter = RateCounter(Rate.parse("1/hour"), clock=lambda: 0.0)
    assert counter.hit("silent") == 0
    assert counter.hit("anna") == 0
    for number in range(MAX_CLIENTS - 1):
        assert counter.hit(f"address {number}") == 0
        assert counter.hit("anna") > 0
    assert counter.hit("silent") == 0


def test_addresses_of_one_network_are_one_client() -> None:
    def name(address: str) -> str:
        return find_client(Request({"type": "http", "client": (address, 1), "state": {}}))

    assert name("2001:db8::1") == name("2001:db8::ffff:2") != name("2001:db8:0:1::1")
    assert name("::ffff:192.0.2.1") == name("192.0.2.1") != name("::ffff:192.0.2.2")


def test_guessing_tokens_is_rate_limited(settings: Settings) -> None:
    with serve(settings, rate_limit="3/hour", api_token=SecretStr(SECRET)) as client:
        guesses = [
            client.get("/jobs", headers={"Authorization": f"Bearer guess-{number}"})
            for number in range(5)
        ]
        assert [guess.status_code for guess in guesses] == [401] * 3 + [429] * 2
        headers = {"Authorization": f"Bearer {SECRET}"}
        assert client.get("/jobs", headers=headers).status_code == 200


def test_token_that_is_named_like_an_address_does_not_pay_for_it(settings: Settings) -> None:
    tokens = (ApiToken.of(SECRET, name="testclient"),)  # the address of the tests' client
    with serve(settings, rate_limit="3/hour", api_tokens=tokens) as client:
        for _ in range(5):
            client.get("/jobs", headers={"Authorization": "Bearer a-wrong-guess-of-a-token"})
        assert client.get("/jobs", headers={"Authorization": f"Bearer {SECRET}"}).status_code == 200


def ask_behind_proxy(service: Service, *, client: str) -> int:
    return httpx.get(f"{service.url}/jobs", headers={"X-Forwarded-For": client}).status_code


@pytest.mark.parametrize(
    ("trusted", "answers"),
    [("", [429, 429]), ("127.0.0.0/8", [429, 401]), ("10.0.0.1", [429, 429])],
    ids=["nobody", "its network", "another"],
)
def test_only_a_trusted_proxy_says_who_asks(
    tmp_path: Path, trusted: str, answers: list[int]
) -> None:
    environment = {"LOSSLAB_RATE_LIMIT": "3/hour", "LOSSLAB_TRUSTED_PROXIES": trusted}
    # uvicorn's own variable, which would let anybody say anything
    service = Service(
        tmp_path, token=SECRET, environment=environment | {"FORWARDED_ALLOW_IPS": "*"}
    )
    service.start("server")
    try:
        for _ in range(3):
            assert ask_behind_proxy(service, client="10.9.0.1") == 401
        assert [ask_behind_proxy(service, client=f"10.9.0.{n}") for n in (1, 2)] == answers
    finally:
        service.stop("server")


def test_each_token_has_a_rate_of_its_own(settings: Settings) -> None:
    tokens = tuple(
        ApiToken.of(f"{name}-{SECRET}", name=name, scope=TokenScope.read)
        for name in ("alice", "bob")
    )
    with serve(settings, rate_limit="2/hour", api_tokens=tokens) as client:

        def ask(name: str) -> int:
            headers = {"Authorization": f"Bearer {name}-{SECRET}"}
            return client.get("/jobs", headers=headers).status_code

        assert [ask("alice") for _ in range(3)] == [200, 200, 429]
        assert [ask("bob") for _ in range(3)] == [200, 200, 429]


def test_streams_are_limited_and_closed_streams_do_not_count(tmp_path: Path) -> None:
    service = Service(tmp_path, environment={"LOSSLAB_MAX_STREAMS": "2"})
    service.start("server")
    try:
        job = service.train("b")
        url, headers = f"{service.url}/jobs/{job['id']}/events", {"Accept": "text/event-stream"}

        def stream() -> httpx.Response:
            # One client per stream: closing it has the effect of closing a browser tab.
            clients.append(httpx.Client())
            request = clients[-1].build_request("GET", url, headers=headers)
            return clients[-1].send(request, stream=True)

        clients: list[httpx.Client] = []
        streams = [stream(), stream()]
        assert [each.status_code for each in streams] == [200, 200]
        lines = [each.iter_lines() for each in streams]
        for each_lines in lines:
            assert next(each_lines)
        refused = httpx.get(url, headers=headers)
        assert refused.status_code == 429
        assert "LOSSLAB_MAX_STREAMS" in refused.json()["detail"]
        assert httpx.get(url).status_code == 200
        streams[0].close()
        clients[0].close()
        deadline = time.monotonic() + 30
        while (again := stream()).status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert again.status_code == 200
        for client in clients:
            client.close()
    finally:
        service.stop("server", signal.SIGTERM)


# -- logs


def read_entries(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_logs_are_json_on_stdout_with_request_and_job_ids_and_no_secret(tmp_path: Path) -> None:
    log_path = tmp_path / "log"
    environment = {"LOSSLAB_JSON_LOGS": "1"}
    service = Service(tmp_path / "data", token=SECRET, environment=environment, log_path=log_path)
    auth = {"Authorization": f"Bearer {SECRET}"}
    try:
        service.start("server", "worker")
        body = {"option": "b", "name": "a body that stays out", **TINY}
        answer = httpx.post(
            f"{service.url}/jobs", json=body, headers=auth | {"X-Request-ID": "mine-1"}
        )
        job_id = answer.raise_for_status().json()["id"]
        url = f"{service.url}/jobs/{job_id}"
        while httpx.get(url, headers=auth, verify=False).json()["status"] != "succeeded":
            time.sleep(0.1)
    finally:
        for name in list(service.processes):
            service.stop(name)
    text = log_path.read_text()
    entries = read_entries(text)
    assert len(entries) == len(text.splitlines())
    (posted,) = [entry for entry in entries if entry.get("method") == "POST"]
    assert posted["request_id"] == answer.headers["X-Request-ID"] == "mine-1"
    assert (posted["path"], posted["status"], posted["token"]) == ("/jobs", 201, "default")
    assert [entry for entry in entries if entry.get("job_id") == job_id]
    assert SECRET not in text
    assert "a body that stays out" not in text


def test_error_in_a_log_is_one_line_with_its_traceback() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logger = logging.Logger("losslab.test")
    logger.addHandler(handler)
    try:
        raise OSError("two\nlines")
    except OSError:
        logger.exception("it %s", "broke")
    (entry,) = read_entries(stream.getvalue())
    assert (entry["level"], entry["message"]) == ("ERROR", "it broke")
    assert str(entry["traceback"]).endswith("OSError: two\nlines")


def test_message_of_several_lines_is_one_line_of_the_log() -> None:
    record = logging.LogRecord("losslab", logging.ERROR, "", 0, "one\r\ntwo: %s", ("a\nb",), None)
    assert logs.LineFormatter("%(message)s").format(record) == "one two: a b"


def test_errors_of_the_database_quote_nothing_that_was_sent(engine: Engine) -> None:
    job = {"id": "0" * 12, "name": "a name that stays out", "option": BuiltInOption.a, "config": {}}
    with Session(engine) as session:
        session.add(Job(**job))
        session.commit()
    with Session(engine) as session, pytest.raises(IntegrityError) as refused:
        session.add(Job(**job))
        session.commit()
    assert "a name that stays out" not in str(refused.value)


def test_lease_needs_room_for_a_late_heartbeat() -> None:
    with pytest.raises(ValueError, match="lease_seconds must be at least three times"):
        Settings(lease_seconds=5, heartbeat_seconds=5)


def test_empty_variable_does_not_hide_a_secret_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "losslab_api_token").write_text("a-secret-from-a-file\n")
    monkeypatch.setenv("LOSSLAB_API_TOKEN", "")
    settings = Settings(_secrets_dir=tmp_path)  # type: ignore[call-arg]
    assert settings.api_token.get_secret_value() == "a-secret-from-a-file"


def test_token_that_was_made_opens_the_service(settings: Settings) -> None:
    done = forks.run("losslab", "token", "alice", "--read-only", environment=os.environ)
    secret, entry = re.findall(r"=(\S+)", done.stdout)
    assert secret not in entry
    made = Settings(data_dir=settings.data_dir, api_tokens=entry)
    assert made.tokens[0].name == "alice"
    headers = {"Authorization": f"Bearer {secret}"}
    with open_client(create_app(made)) as client:
        assert client.get("/jobs").status_code == 401
        assert client.get("/jobs", headers=headers).status_code == 200
        assert client.post("/jobs", headers=headers, json={"option": "b"}).status_code == 403


def test_token_of_an_odd_name_is_refused() -> None:
    done = forks.run("losslab", "token", "a:b", environment=os.environ)
    assert done.returncode != 0
    assert "'a:b'" in done.stderr
    assert "Traceback" not in done.stderr


# -- cores


@pytest.mark.parametrize(("set_in_all", "started", "told"), [(1, 1, 1), (4, 1, 4), (1, 3, 3)])
def test_worker_is_told_how_many_share_its_cores(set_in_all: int, started: int, told: int) -> None:
    settings = Settings(num_workers=set_in_all)
    environment = worker_environment(settings, num_workers=started)
    assert environment["LOSSLAB_NUM_WORKERS"] == str(told)


@pytest.mark.parametrize(
    "start",
    [
        "from server import settings\n"
        "from server.cli import processes\n"
        "processes.ServerThread(settings.Settings(port=0), log_level='info')",
        "import contextlib, runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('worker', run_name='__main__')",
    ],
    ids=["server", "worker"],
)
def test_garbage_is_collected_once_all_is_imported(start: str) -> None:
    look = "import gc\nassert gc.isenabled()\nassert gc.get_freeze_count() > 100_000"
    subprocess.run([sys.executable, "-c", f"{start}\n{look}"], check=True)
