"""A repeated request is executed once."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import BOTH_DATABASES, open_client
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine, func, select, update

from server.database.engine import write_transaction
from server.jobs import answers
from server.jobs.answers import REMEMBER_FOR, expire_answers
from server.main import create_app
from server.models.columns import utc_now
from server.models.tables import IdempotencyKey, Job, Worker
from server.settings import Settings
from server.tokens import ApiToken

pytestmark = BOTH_DATABASES

BODY = {"option": "b", "quick_test": True}


def post(client: TestClient, key: str, *, token: str = "", **body: object) -> Response:
    headers = {"Idempotency-Key": key} | ({"Authorization": f"Bearer {token}"} if token else {})
    return client.post("/jobs", json=BODY | body, headers=headers)


def count_jobs(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(Job)).scalar_one()


def test_same_request_is_answered_alike_and_makes_one_job(
    client: TestClient, engine: Engine
) -> None:
    first = post(client, "run-1")
    client.post(f"/jobs/{first.json()['id']}/cancel").raise_for_status()
    again = post(client, "run-1")
    assert (first.status_code, again.status_code) == (201, 201)
    assert (again.content, again.headers["location"]) == (first.content, first.headers["location"])
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert count_jobs(engine) == 1


def test_another_request_under_the_same_key_is_refused(client: TestClient, engine: Engine) -> None:
    post(client, "run-1").raise_for_status()
    answer = post(client, "run-1", option="a")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert count_jobs(engine) == 1


def test_requests_without_a_key_or_with_their_own_make_a_job_each(
    client: TestClient, engine: Engine
) -> None:
    for key in ("run-1", "run-2"):
        post(client, key).raise_for_status()
    for _ in range(2):
        client.post("/jobs", json=BODY).raise_for_status()
    assert count_jobs(engine) == 4


def test_same_request_at_the_same_time_makes_one_job(client: TestClient, engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(client, "run-1"), range(24)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert count_jobs(engine) == 1


def test_refused_request_may_be_corrected_under_its_key(client: TestClient, engine: Engine) -> None:
    assert post(client, "run-1", dataset="nowhere").status_code == 422
    assert post(client, "run-1").status_code == 201
    assert count_jobs(engine) == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "x" * 256])
def test_key_of_odd_characters_is_refused(client: TestClient, engine: Engine, key: str) -> None:
    headers = {"Idempotency-Key": key.encode()}
    assert client.post("/jobs", json=BODY, headers=headers).status_code == 422
    assert count_jobs(engine) == 0


def test_key_is_forgotten_after_a_day(client: TestClient, engine: Engine) -> None:
    first = post(client, "run-1").json()
    with engine.begin() as connection:
        long_ago = utc_now() - 2 * REMEMBER_FOR
        connection.execute(update(IdempotencyKey).values(created_at=long_ago))
    assert post(client, "run-1").json()["id"] != first["id"]
    with engine.connect() as connection:
        assert len(connection.execute(select(IdempotencyKey.key)).all()) == 1


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """A service for alice and bob."""
    tokens = tuple(ApiToken.of(f"{name}-secret", name=name) for name in ("alice", "bob"))
    with open_client(create_app(settings.model_copy(update={"api_tokens": tokens}))) as client:
        yield client


def test_tokens_do_not_see_each_others_keys(guarded: TestClient, engine: Engine) -> None:
    ids = [post(guarded, "run-1", token=f"{name}-secret").json()["id"] for name in ("alice", "bob")]
    assert len(set(ids)) == count_jobs(engine) == 2
    assert post(guarded, "run-1", token="bob-secret", option="c").status_code == 422


def test_request_is_answered_again_though_its_data_set_has_gone_and_the_database_is_busy(
    client: TestClient, settings: Settings, write_npz: Callable[..., str]
) -> None:
    name = write_npz(images=np.zeros((20, 8, 8), dtype=np.uint8))
    first = post(client, "run-1", dataset=name)
    (settings.datasets_dir / f"{name}.npz").unlink()
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    with write_transaction(engine):
        again = post(client, "run-1", dataset=name)
    assert (again.status_code, again.content) == (201, first.content)


def count_keys(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(IdempotencyKey)).scalar_one()


def test_kept_answer_goes_with_its_job(client: TestClient, engine: Engine) -> None:
    job_id = post(client, "run-1", name="private").json()["id"]
    post(client, "run-2").raise_for_status()
    client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    assert count_keys(engine) == 2
    client.delete(f"/jobs/{job_id}").raise_for_status()
    with engine.connect() as connection:
        assert "private" not in str(connection.execute(select(IdempotencyKey.answer)).all())
    assert count_keys(engine) == 1
    again = post(client, "run-1", name="private")
    assert "idempotency-replayed" not in again.headers
    assert again.json()["id"] != job_id


def test_kept_answers_go_with_their_study_and_its_jobs(client: TestClient, engine: Engine) -> None:
    body = {"options": ["a", "b"], "num_seeds": 2}
    answer = client.post("/studies", json=body, headers={"Idempotency-Key": "study"})
    study_id = answer.raise_for_status().json()["id"]
    client.post(f"/studies/{study_id}/cancel").raise_for_status()
    assert count_keys(engine) == 1
    client.delete(f"/studies/{study_id}").raise_for_status()
    assert count_keys(engine) == 0


def test_worker_no_longer_names_a_deleted_job(client: TestClient, engine: Engine) -> None:
    job_id = post(client, "run-1").json()["id"]
    client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    with write_transaction(engine) as session:
        session.add(Worker(id="w", host="h", pid=1, device="cpu", state="idle", job_id=job_id))
    client.delete(f"/jobs/{job_id}").raise_for_status()
    with engine.connect() as connection:
        assert connection.execute(select(Worker.job_id)).scalar_one() is None


def test_upkeep_deletes_old_answers_without_another_request(
    client: TestClient, engine: Engine
) -> None:
    for key in ("old", "new"):
        post(client, key).raise_for_status()
    with write_transaction(engine) as session:
        session.execute(
            update(IdempotencyKey)
            .where(IdempotencyKey.key == "old")
            .values(created_at=utc_now() - 2 * REMEMBER_FOR)
        )
    expire_answers(engine)
    with engine.connect() as connection:
        assert connection.execute(select(IdempotencyKey.key)).scalars().all() == ["new"]


def test_of_too_many_keys_the_oldest_are_forgotten(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_KEYS", 3)
    for number in range(5):
        post(client, f"run-{number}").raise_for_status()
    with engine.connect() as connection:
        keys = set(connection.execute(select(IdempotencyKey.key)).scalars())
    assert keys == {"run-2", "run-3", "run-4"}


def test_of_too_long_answers_the_oldest_are_forgotten(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An answer is as long as any other, but for the digits of its numbers.
    num_bytes = len(post(client, "run-0", name="\N{EURO SIGN}" * 60).content)
    monkeypatch.setattr(answers, "MAX_BYTES", round(2.5 * num_bytes))
    for number in range(1, 4):
        post(client, f"run-{number}", name="\N{EURO SIGN}" * 60).raise_for_status()
    with engine.connect() as connection:
        rows = connection.execute(select(IdempotencyKey.key, IdempotencyKey.num_bytes)).all()
    assert {row.key for row in rows} == {"run-2", "run-3"}
    assert sum(row.num_bytes for row in rows) == pytest.approx(2 * num_bytes, rel=0.05)
