"""The events of a job, as a page and as a live stream that survives the server."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import forks
import httpx
import pytest
from conftest import BOTH_DATABASES, SubmitJob, drain
from fastapi.testclient import TestClient
from forks import Fork
from sqlalchemy import Engine

from server.api.event_feed import EventFeed
from server.database.engine import write_transaction
from server.jobs import queue
from server.models.tables import JobEvent
from server.settings import Settings

pytestmark = BOTH_DATABASES

STREAM = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Message:
    """One server-sent event."""

    id: int | None
    event: str
    data: dict[str, object]


def parse(lines: Iterator[str]) -> Iterator[Message]:
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and fields:
            number = int(fields["id"]) if "id" in fields else None
            yield Message(number, fields["event"], json.loads(fields["data"]))
            fields = {}


def test_events_tell_a_job_from_its_submission_to_its_end(
    client: TestClient, settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job(epochs=2)
    drain(settings, engine)
    page = client.get(f"/jobs/{job.id}/events").json()
    kinds = [event["kind"] for event in page["data"]]
    of_an_epoch = ["epoch", "checkpoint", "reconstruction"]
    assert kinds == ["queued", "running", *of_an_epoch, *of_an_epoch, "succeeded"]
    assert not page["has_more"]
    epoch = page["data"][2]["data"]
    assert epoch["epoch"] == 1
    assert len(epoch["val_kl_per_dimension"]) == 10


def test_event_of_a_kind_that_this_version_does_not_know_is_told_as_it_is(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    with write_transaction(engine) as session:
        session.add(JobEvent(job_id=job.id, kind="of_tomorrow", message="something new"))
    page = client.get(f"/jobs/{job.id}/events").raise_for_status().json()
    assert [event["kind"] for event in page["data"]] == ["queued", "of_tomorrow"]


def test_stream_of_a_job_that_is_deleted_ends(engine: Engine, submit_job: SubmitJob) -> None:
    job = submit_job()

    async def follow() -> list[str]:
        feed = EventFeed(engine, keep_alive_seconds=0.2)
        kinds = []
        async for event in feed.follow(job.id, after=0):
            if event is not None:
                kinds.append(event.kind)
                await asyncio.to_thread(delete)
        return kinds

    def delete() -> None:
        queue.cancel(engine, job.id)
        queue.remove(engine, job.id)

    assert asyncio.run(asyncio.wait_for(follow(), 30)) == ["queued"]


def test_many_jobs_are_watched_at_a_time(engine: Engine, submit_job: SubmitJob) -> None:
    jobs = [submit_job() for _ in range(450)]

    async def first_events() -> set[str]:
        feed = EventFeed(engine)
        reader = asyncio.create_task(feed.run())
        streams = [feed.follow(job.id, after=0) for job in jobs]
        for stream in streams:
            await anext(stream)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0.1)
        for job in (jobs[0], jobs[250], jobs[-1]):
            await asyncio.to_thread(queue.pause, engine, job.id)
        async with asyncio.timeout(60):
            while sum(task.done() for task in waiting) < 3:
                await asyncio.sleep(0.05)
        seen = {event.job_id for task in waiting if task.done() and (event := task.result())}
        reader.cancel()
        for task in waiting:
            task.cancel()
        await asyncio.gather(reader, *waiting, return_exceptions=True)
        return seen

    assert asyncio.run(first_events()) == {jobs[0].id, jobs[250].id, jobs[-1].id}


def test_events_come_in_pages(client: TestClient, engine: Engine, submit_job: SubmitJob) -> None:
    job = submit_job()
    for _ in range(3):
        queue.pause(engine, job.id)
        queue.resume(engine, job.id)
    seen: list[str] = []
    query = {"limit": 2, "after": 0}
    while True:
        page = client.get(f"/jobs/{job.id}/events", params=query).json()
        seen += [event["kind"] for event in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["data"][-1]["id"]
    assert seen == ["queued", *["paused", "queued"] * 3]


def test_stream_of_an_ended_job_replays_it_and_closes(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    queue.cancel(engine, job.id)
    answer = client.get(f"/jobs/{job.id}/events", headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, second, end = parse(iter(answer.text.splitlines()))
    assert [first.event, second.event, end.event] == ["queued", "cancelled", "end"]
    assert end.id is None
    missed = client.get(f"/jobs/{job.id}/events", headers=STREAM | {"Last-Event-ID": str(first.id)})
    assert list(parse(iter(missed.text.splitlines()))) == [second, end]


@pytest.mark.parametrize("number", ["x", "-1", "1e3", str(2**40)])
def test_last_event_id_that_is_none_is_refused(
    client: TestClient, submit_job: SubmitJob, number: str
) -> None:
    answer = client.get(
        f"/jobs/{submit_job().id}/events", headers=STREAM | {"Last-Event-ID": number}
    )
    assert answer.status_code == 422


def test_stream_of_an_unknown_job_is_a_problem(client: TestClient) -> None:
    assert client.get("/jobs/000000000000/events", headers=STREAM).status_code == 404


def test_stream_survives_a_killed_server_with_no_event_lost_or_doubled(
    settings: Settings, submit_job: SubmitJob
) -> None:
    job = submit_job(epochs=12)
    port = find_free_port()
    url = f"http://127.0.0.1:{port}/jobs/{job.id}/events"
    seen: list[Message] = []
    with running(settings, "worker", "--drain"):
        with running(settings, "losslab", "serve", "--port", str(port)) as server:
            wait_until_it_answers(url)
            seen += follow(url, seen, until=10)
            server.send_signal(signal.SIGKILL)
            server.wait()
        assert seen[-1].event != "end"
        with running(settings, "losslab", "serve", "--port", str(port)):
            wait_until_it_answers(url)
            seen += follow(url, seen)
            page = httpx.get(url, params={"limit": 1000}).json()["data"]
    assert seen[-1].event == "end"
    assert [message.data for message in seen[:-1]] == page
    assert all(before < after for before, after in pairwise(m.id or 0 for m in seen[:-1]))
    assert page[-1]["kind"] == "succeeded"


def follow(url: str, seen: list[Message], *, until: int | None = None) -> list[Message]:
    """The stream's messages after `seen`, to its end or up to a number of messages."""
    headers = STREAM | ({"Last-Event-ID": str(seen[-1].id)} if seen else {})
    messages = []
    with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
        for message in parse(answer.iter_lines()):
            messages.append(message)
            if len(seen) + len(messages) == until:
                break
    return messages


@contextmanager
def running(settings: Settings, program: str, *arguments: str) -> Iterator[Fork]:
    """A process of Losslab, which ends with the block."""
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_DATABASE_URL": settings.database_url,
        "LOSSLAB_NUM_WORKERS": "2",  # one thread: two would wait for each other on busy cores
    }
    with open(os.devnull, "w") as log:
        process = forks.start(program, *arguments, environment=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=40)


def wait_until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=10, verify=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise TimeoutError(f"{url} does not answer")


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_one_client_never_takes_all_streams(engine: Engine) -> None:
    feed = EventFeed(engine)
    with ExitStack() as stack:

        def admit(client: str) -> bool:
            return stack.enter_context(feed.admit(client, max_streams=8))

        assert [admit("token anna") for _ in range(8)] == 6 * [True] + 2 * [False]
        assert [admit("address anna") for _ in range(3)] == [True, True, False]
        assert feed.num_streams == 8
    assert feed.num_streams == 0
    with feed.admit("token anna", max_streams=8) as is_admitted:
        assert is_admitted


def test_place_of_a_stream_that_breaks_is_free_again(engine: Engine) -> None:
    feed = EventFeed(engine)
    with pytest.raises(RuntimeError), feed.admit("anna", max_streams=1):
        raise RuntimeError
    assert feed.num_streams == 0
