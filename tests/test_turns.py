"""Slow answers are computed a few at a time, in turns between clients, and equal ones once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from conftest import open_client
from fastapi import Response

from server.api.turns import NUM_TURNS, Turns
from server.errors import UnavailableError
from server.main import create_app
from server.settings import Settings


class Bench:
    """Requests that take a turn until they are let go, in the order in which they got it."""

    def __init__(self, num_turns: int = 1, *, wait_seconds: float = 30.0) -> None:
        self.turns = Turns(num_turns, purpose="compute", wait_seconds=wait_seconds)
        self.begun: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def ask(self, client: str, request: str) -> bytes:
        async def work() -> Response:
            self.begun.append(request)
            await self.gates.setdefault(request, asyncio.Event()).wait()
            return Response(f"{request} {len(self.begun)}")

        return bytes((await self.turns.answer_together(client, request, work=work)).body)

    def let_go(self, request: str) -> None:
        self.gates.setdefault(request, asyncio.Event()).set()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(check: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await check

    asyncio.run(limited())


def test_no_more_requests_compute_than_there_are_turns() -> None:
    async def check() -> None:
        bench = Bench(2)
        tasks = [asyncio.create_task(bench.ask("anna", str(number))) for number in range(4)]
        await settle()
        assert bench.begun == ["0", "1"]
        bench.let_go("1")
        await settle()
        assert bench.begun == ["0", "1", "2"]
        for request in ("0", "2", "3"):
            bench.let_go(request)
        assert len(await asyncio.gather(*tasks)) == 4

    run(check())


def test_turns_go_round_the_clients_however_many_requests_one_of_them_has() -> None:
    async def check() -> None:
        bench = Bench()
        asked = [("anna", f"a{number}") for number in range(5)] + [("bert", "b"), ("cleo", "c")]
        tasks = [asyncio.create_task(bench.ask(*each)) for each in asked]
        await settle()
        for _, request in asked:
            bench.let_go(request)
        await asyncio.gather(*tasks)
        assert bench.begun == ["a0", "a1", "b", "c", "a2", "a3", "a4"]

    run(check())


def test_equal_requests_that_wait_are_computed_once_and_later_ones_again() -> None:
    async def check() -> None:
        bench = Bench()
        first = asyncio.create_task(bench.ask("anna", "other"))
        await settle()
        waiting = [asyncio.create_task(bench.ask("anna", "same")) for _ in range(5)]
        await settle()
        bench.let_go("other")
        await settle()
        assert bench.begun == ["other", "same"]
        later = asyncio.create_task(bench.ask("anna", "same"))
        await settle()
        bench.let_go("same")
        assert await first == b"other 1"
        assert set(await asyncio.gather(*waiting)) == {b"same 2"}
        assert await later == b"same 3"

    run(check())


def test_request_whose_leader_was_cancelled_computes_itself() -> None:
    async def check() -> None:
        bench = Bench()
        first = asyncio.create_task(bench.ask("anna", "other"))
        await settle()
        leader = asyncio.create_task(bench.ask("anna", "same"))
        await settle()
        other = asyncio.create_task(bench.ask("anna", "same"))
        await settle()
        leader.cancel()
        await settle()
        bench.let_go("other")
        bench.let_go("same")
        assert (await first, await other) == (b"other 1", b"same 2")
        assert await bench.ask("anna", "same") == b"same 3"  # no turn was lost

    run(check())


def test_request_that_waits_too_long_is_told_to_try_later() -> None:
    async def check() -> None:
        bench = Bench(wait_seconds=0.05)
        first = asyncio.create_task(bench.ask("anna", "slow"))
        await settle()
        with pytest.raises(UnavailableError, match="no turn came in"):
            await bench.ask("bert", "quick")
        bench.let_go("slow")
        await first
        bench.let_go("quick")
        assert await bench.ask("bert", "quick") == b"quick 2"

    run(check())


@pytest.mark.parametrize("is_same", [False, True])
def test_client_with_many_waiting_requests_is_refused_at_once_and_others_are_not(
    is_same: bool,
) -> None:
    async def check() -> None:
        bench = Bench(2)
        names = [f"same {number // 40}" if is_same else str(number) for number in range(80)]
        tasks = [asyncio.create_task(bench.ask("anna", name)) for name in names]
        await settle()
        refused = [task for task in tasks if task.done()]
        assert len(tasks) - len(refused) == 32 + 2
        for task in refused:
            with pytest.raises(UnavailableError, match="32 of your requests wait already"):
                task.result()
        other = asyncio.create_task(bench.ask("bert", "other"))
        await settle()
        for name in (*names, "other"):
            bench.let_go(name)
        assert (await other).startswith(b"other")
        assert await bench.ask("anna", names[0])  # there is room again

    run(check())


def test_many_clients_together_wait_in_a_bounded_number() -> None:
    async def check() -> None:
        bench = Bench(1)
        tasks = [
            asyncio.create_task(bench.ask(f"client {number % 8}", str(number)))
            for number in range(80)
        ]
        await settle()
        refused = [task for task in tasks if task.done()]
        assert len(refused) == 80 - 1 - 64
        with pytest.raises(UnavailableError, match="too many wait"):
            refused[0].result()
        for number in range(80):
            bench.let_go(str(number))
        await asyncio.wait(tasks)

    run(check())


@pytest.mark.parametrize(
    "path", ["/comparisons", "/comparisons/curves.png", "/comparisons/report.html", "/ui/compare"]
)
def test_others_are_answered_while_all_turns_are_taken(settings: Settings, path: str) -> None:
    # Pictures take long where the machine is busy.
    app = create_app(settings.model_copy(update={"request_seconds": 120.0}))
    app.state.turns = Turns(NUM_TURNS, purpose="compute", wait_seconds=0.1)
    with open_client(app) as client:
        job_id = client.post("/jobs", json={"option": "b"}).json()["id"]
        holds = [app.state.turns.hold(f"client {number}") for number in range(NUM_TURNS)]
        assert client.portal is not None
        for hold in holds:
            client.portal.call(hold.__aenter__)
        answer = client.get(path, params={"job_id": job_id})
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert client.get("/jobs").status_code == 200
        assert client.get("/ui/compare").status_code == 200  # the list to choose from
        for hold in holds:
            client.portal.call(hold.__aexit__, None, None, None)
        assert client.get(path, params={"job_id": job_id}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_request_without_a_body_that_waits_too_long_is_not_told_that_its_body_is_missing(
    settings: Settings, method: str
) -> None:
    app = create_app(settings.model_copy(update={"request_seconds": 0.3}))
    with open_client(app) as client:
        app.state.session_turns = Turns(0, purpose="read", wait_seconds=30.0)
        answer = client.request(method, "/jobs")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert "body" not in answer.text
