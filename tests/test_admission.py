"""What is admitted at the same time: jobs, data sets, and the end of data sets, by
several servers."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from conftest import BOTH_DATABASES, open_client, queue_job
from fastapi.testclient import TestClient
from httpx2 import Response
from npz_files import make_npz
from sqlalchemy import Engine
from sqlmodel import Session
from study_results import submit_study

from server.database.engine import take_turn, write_transaction
from server.files.datasets import list_npz
from server.jobs import queue, seeds, studies
from server.jobs.admission import Admission, QueueFullError, count_queued
from server.jobs.submission import new_job, submit_job
from server.main import create_app
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption
from server.models.tables import Job, JobStatus
from server.settings import Settings
from server.tokens import ApiToken, TokenScope

pytestmark = BOTH_DATABASES

CONTENT = make_npz(images=np.zeros((20, 8, 8), dtype=np.uint8))
WANTED = {"option": "b", "dataset": "mine", "num_samples": 100, "epochs": 1}
#: Until all requests wait for their turn.
HEAD_START_SECONDS = 0.5

Call = Callable[[], Response]


@pytest.fixture
def other(settings: Settings) -> Iterator[TestClient]:
    """Another server on the same data."""
    with open_client(create_app(settings)) as client:
        yield client


def ask_together(engine: Engine, *calls: Call) -> list[int]:
    """The statuses of requests that all wait for one turn, and then begin at once."""
    with ThreadPoolExecutor(len(calls)) as threads:
        with write_transaction(engine) as session:
            take_turn(session)
            answers = [threads.submit(call) for call in calls]
            time.sleep(HEAD_START_SECONDS)
        return [answer.result().status_code for answer in answers]


def upload(client: TestClient, name: str = "mine", content: bytes = CONTENT) -> Response:
    return client.put(f"/datasets/{name}", content=content)


def post_and_cancel(client: TestClient) -> str:
    job_id: str = client.post("/jobs", json=WANTED).raise_for_status().json()["id"]
    client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    return job_id


def submit_form(client: TestClient, path: str, **fields: str) -> Response:
    headers = {"Origin": "http://localhost"}
    return client.post(path, data=fields, headers=headers, follow_redirects=False)


def ask_for_job(client: TestClient) -> Call:
    return lambda: client.post("/jobs", json=WANTED)


def ask_by_form(client: TestClient) -> Call:
    return lambda: submit_form(client, "/ui/jobs", option="b", dataset="mine")


def ask_for_study(client: TestClient) -> Call:
    config = {key: WANTED[key] for key in ("dataset", "num_samples", "epochs")}
    return lambda: client.post("/studies", json={"options": ["a", "b"], "config": config})


def ask_to_resume(client: TestClient) -> Call:
    job_id = post_and_cancel(client)
    return lambda: client.post(f"/jobs/{job_id}/resume")


def ask_to_resume_by_form(client: TestClient) -> Call:
    job_id = post_and_cancel(client)
    return lambda: submit_form(client, f"/ui/jobs/{job_id}/resume")


def ask_to_resume_study(client: TestClient) -> Call:
    study_id = ask_for_study(client)().raise_for_status().json()["id"]
    client.post(f"/studies/{study_id}/cancel").raise_for_status()
    return lambda: client.post(f"/studies/{study_id}/resume")


def ask_for_seeds(client: TestClient) -> Call:
    study_id = ask_for_study(client)().raise_for_status().json()["id"]
    client.post(f"/studies/{study_id}/cancel").raise_for_status()
    return lambda: client.post(f"/studies/{study_id}/seeds", json={"num": 1})


def submit(engine: Engine, admission: Admission) -> bool:
    """Whether a job was queued."""
    try:
        with write_transaction(engine) as session:
            submit_job(session, new_job(TrainingConfig(), option="a"), admission=admission)
    except QueueFullError:
        return False
    return True


WAYS = (
    ask_for_job, ask_by_form, ask_for_study, ask_to_resume, ask_to_resume_by_form,
    ask_to_resume_study, ask_for_seeds,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_of_a_job_and_the_end_of_its_data_set_one_is_refused(
    client: TestClient, other: TestClient, engine: Engine, way: Callable[[TestClient], Call]
) -> None:
    upload(client).raise_for_status()
    asked, deleted = ask_together(engine, way(client), lambda: other.delete("/datasets/mine"))
    with Session(engine) as session:
        num_queued = count_queued(session)
    assert (asked in (200, 201, 303)) == (num_queued > 0) == (deleted == 409)
    assert asked in (200, 201, 303, 409, 422)
    assert deleted in (204, 409)


def test_queue_takes_no_more_than_its_limit_however_many_ask(
    engine: Engine, settings: Settings
) -> None:
    admission = Admission(settings.datasets_dir, max_queued_jobs=5)
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: submit(engine, admission), range(24)))
    with Session(engine) as session:
        assert (taken.count(True), count_queued(session)) == (5, 5)


def test_cancelled_jobs_are_not_resumed_above_the_limit(engine: Engine, settings: Settings) -> None:
    admission = Admission(settings.datasets_dir, max_queued_jobs=3)
    jobs = [queue_job(engine, option=BuiltInOption.a, config=TrainingConfig()) for _ in range(8)]
    for job in jobs:
        queue.cancel(engine, job.id)

    def resume(job: Job) -> bool:
        try:
            return queue.resume(engine, job.id, admission=admission).status == JobStatus.queued
        except QueueFullError:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(resume, jobs)).count(True) == 3


def test_study_is_not_resumed_above_the_limit(engine: Engine, settings: Settings) -> None:
    study_id = submit_study(engine, settings)
    with write_transaction(engine) as session:
        studies.cancel_study(session, study_id)
        num_jobs = studies.count_jobs(session, [study_id])[study_id].num_jobs
    for limit, is_taken in ((num_jobs - 1, False), (num_jobs, True)):
        admission = Admission(settings.datasets_dir, max_queued_jobs=limit)
        try:
            with write_transaction(engine) as session:
                studies.resume_study(session, study_id, admission=admission)
        except QueueFullError:
            assert not is_taken
        else:
            assert is_taken


@pytest.mark.parametrize("way", WAYS)
def test_one_token_of_several_leaves_a_quarter_of_the_queue_to_others(
    settings: Settings, engine: Engine, way: Callable[[TestClient], Call]
) -> None:
    tokens = tuple(ApiToken.of(f"the secret of {name}", name=name) for name in ("ada", "bob"))
    limits = {"api_tokens": tokens, "max_queued_jobs": 40}
    with ExitStack() as clients:
        app = create_app(settings.model_copy(update=limits))
        ada, bob = (clients.enter_context(open_client(app)) for _ in tokens)
        for client, token in zip((ada, bob), tokens, strict=True):
            client.headers["Authorization"] = f"Bearer the secret of {token.name}"
        upload(ada).raise_for_status()
        ask = way(ada)
        own = Admission(settings.datasets_dir, queued_by="ada")
        assert all(submit(engine, own) for _ in range(30))
        answer = ask()
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) > 0
        assert "30 jobs of the token" in answer.text and "ada" in answer.text
        assert ask_for_job(bob)().status_code == 201


def test_resumed_job_counts_for_who_resumed_it(engine: Engine, settings: Settings) -> None:
    posted = queue_job(engine, option=BuiltInOption.a, config=TrainingConfig())
    queue.cancel(engine, posted.id)
    own = Admission(settings.datasets_dir, 10, max_of_token=1, queued_by="ada")
    queue.resume(engine, posted.id, admission=own)
    assert not submit(engine, own)
    assert submit(engine, replace(own, queued_by="bob"))


def test_token_that_is_alone_can_have_the_whole_queue(settings: Settings) -> None:
    reader = ApiToken.of("the secret of eve", name="eve", scope=TokenScope.read)
    tokens = (ApiToken.of("the secret of ada", name="ada"), reader)
    assert Admission.of(settings.model_copy(update={"api_tokens": tokens})).max_of_token is None


def test_seeds_of_studies_share_the_limit_with_jobs(engine: Engine, settings: Settings) -> None:
    study_ids = [submit_study(engine, settings) for _ in range(4)]
    with Session(engine) as session:
        num_queued = count_queued(session)
    admission = Admission(settings.datasets_dir, max_queued_jobs=num_queued + 5)

    def extend(study_id: str) -> int:
        try:
            with write_transaction(engine) as session:
                study = seeds.extend_study(
                    session, study_id, num_seeds=1, arms=None, looks=[6], admission=admission
                )
                return len(study.arms)
        except QueueFullError:
            return 0

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(extend, study_id) for study_id in study_ids]
        asked += [threads.submit(submit, engine, admission) for _ in range(8)]
        added = [each.result() for each in asked]
    with Session(engine) as session:
        assert count_queued(session) == num_queued + sum(added) == num_queued + 5


def test_uploads_that_end_together_stay_within_the_bytes_that_may_be_stored(
    engine: Engine, settings: Settings
) -> None:
    limit = 2 * len(CONTENT) + 10
    limited = settings.model_copy(update={"max_storage_bytes": limit})
    with open_client(create_app(limited)) as one, open_client(create_app(limited)) as two:
        for client in (one, two):
            client.get(
                "/datasets"
            ).raise_for_status()  # FastAPI makes the routes at their first use
        calls = [
            lambda number=number: upload((one, two)[number % 2], f"d{number}")
            for number in range(4)
        ]
        statuses = ask_together(engine, *calls)
    stored = sum(path.stat().st_size for path in list_npz(settings.datasets_dir))
    assert stored <= limit
    assert statuses.count(201) == len(list_npz(settings.datasets_dir)) > 0
    assert set(statuses) <= {201, 503, 507}
