"""A request that is answered since its time is over frees nothing that its thread still uses."""

import threading
from collections.abc import Iterator

import pytest
from conftest import BOTH_DATABASES, open_client
from fastapi import FastAPI
from fastapi.testclient import TestClient
from fault_worker import wait_for
from sqlalchemy import event, text

from server.api.dependencies import SessionDep
from server.api.turns import NUM_SESSIONS, NUM_TURNS, TurnRoute
from server.main import create_app
from server.settings import Settings

pytestmark = BOTH_DATABASES


class Slow:
    """Routes that read the database, compute until they are let go, and read again."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.may_end = threading.Event()
        self.num_begun = 0
        self.seen: list[str] = []
        app.get("/slow")(self.compute)
        app.router.add_api_route("/slow-in-turn", self.compute, route_class_override=TurnRoute)

    def compute(self, session: SessionDep) -> str:
        session.execute(text("SELECT 1"))
        self.num_begun += 1
        self.may_end.wait(30)
        session.execute(text("SELECT 1"))
        self.seen.append("computed")
        return "computed"

    def note_returned_connections(self) -> None:
        def note(*_: object) -> None:
            self.seen.append("returned")

        event.listen(self.app.state.engine, "checkin", note)

    @property
    def num_free(self) -> tuple[int, int]:
        return self.app.state.session_turns.num_free, self.app.state.turns.num_free


@pytest.fixture
def slow(settings: Settings) -> Slow:
    return Slow(create_app(settings.model_copy(update={"request_seconds": 0.5})))


@pytest.fixture
def client(slow: Slow) -> Iterator[TestClient]:
    with open_client(slow.app) as client:
        yield client


@pytest.mark.parametrize("path", ["/slow", "/slow-in-turn?x=1"])
def test_late_request_keeps_its_turn_and_its_session_until_its_thread_has_ended(
    slow: Slow, client: TestClient, path: str
) -> None:
    assert client.get(path).status_code == 503
    assert slow.num_begun == 1
    is_in_turn = "turn" in path
    assert slow.num_free == (NUM_SESSIONS - 1, NUM_TURNS - is_in_turn)
    slow.note_returned_connections()
    slow.may_end.set()
    wait_for(lambda: slow.num_free == (NUM_SESSIONS, NUM_TURNS))
    assert slow.seen.index("computed") < slow.seen.index("returned")
    assert client.get(path).text == '"computed"'


def test_late_requests_do_not_compute_more_at_a_time_than_there_are_turns(
    slow: Slow, client: TestClient
) -> None:
    answers = [client.get(f"/slow-in-turn?x={number}") for number in range(5)]
    assert [answer.status_code for answer in answers] == [503] * 5
    assert slow.num_begun == NUM_TURNS
    slow.may_end.set()
    wait_for(lambda: slow.num_free == (NUM_SESSIONS, NUM_TURNS))
    assert slow.num_begun == NUM_TURNS
