"""What an upload may take: memory, time, space, and turns."""

import asyncio
import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_client
from fastapi import HTTPException, Request
from fastapi.testclient import TestClient
from npz_files import GRIDS, make_npz
from sqlalchemy import Engine
from starlette.requests import ClientDisconnect

from server.api import uploads as uploads_module
from server.api.uploads import MAX_UPLOADS, MAX_UPLOADS_OF_CLIENT, Uploads
from server.errors import UnavailableError
from server.files import inspection
from server.files.datasets import open_upload
from server.files.imports import Fit
from server.files.inspection import MAX_WAITING, CheckLimitError, read_contents
from server.files.npz import DatasetError, read_header
from server.jobs import retention
from server.main import create_app
from server.settings import Settings

CONTENT = make_npz(images=GRIDS)
#: Python needs many times as much memory for it.
EMPTY_LISTS = b"[" + b"[]," * 1_000_000 + b"[]]"
_PAIRS = b'{"train": [{"input": [[1]], "output": [[1]]}], "x": ['


@pytest.fixture(scope="module")
def slow_content() -> bytes:
    """Tasks with so many numbers beside them that to read them takes seconds."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(4):
            archive.writestr(f"{number}.json", _PAIRS + b"1," * (2**24 - 100) + b"1]}")
    return file.getvalue()


class MeasuredFile(io.BytesIO):
    """Remembers how many bytes were asked for at once."""

    most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.most = max(self.most, sys.maxsize if size is None or size < 0 else size)
        return super().read(size)


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_array_that_claims_a_header_of_a_gigabyte_is_refused_unread(
    version: tuple[int, int],
) -> None:
    file = MeasuredFile(b"\x93NUMPY" + bytes(version) + struct.pack("<I", 2**30) + bytes(1000))
    with pytest.raises(DatasetError, match=f"{2**30} bytes; 10000 are allowed"):
        read_header(file, key="images")
    assert file.most < 100


def test_upload_that_takes_too_much_memory_is_refused_with_the_limit(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MAX_CHECK_BYTES", 48 * 2**20)
    answer = client.put("/datasets/mine", content=EMPTY_LISTS)
    assert answer.status_code == 422
    assert "48 MiB of memory" in answer.json()["detail"]
    assert list(settings.datasets_dir.iterdir()) == []
    assert client.put("/datasets/mine", content=CONTENT).status_code == 201


def test_file_that_was_put_into_the_folder_is_described_within_the_limit(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.datasets_dir.mkdir()
    large = np.zeros((20_000, 8, 8), dtype=np.int64)
    (settings.datasets_dir / "mine.npz").write_bytes(make_npz(images=large))
    monkeypatch.setattr(inspection, "MAX_CHECK_BYTES", 2**20)
    for path in ("/datasets/mine", "/datasets/mine/preview.png"):
        answer = client.get(path)
        assert (answer.status_code, "of memory" in answer.json()["detail"]) == (422, True)


def test_check_that_takes_too_long_is_ended(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "MAX_UPLOAD_SECONDS", 0.01)
    answer = client.put("/datasets/mine", content=CONTENT)
    assert (answer.status_code, "longer than 0.01 s" in answer.json()["detail"]) == (422, True)


def test_check_of_an_upload_has_some_seconds_of_the_processor(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, slow_content: bytes
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "MAX_UPLOAD_PROCESSOR_SECONDS", 1)
        answer = client.put("/datasets/mine", content=slow_content)
    assert answer.status_code == 422
    assert "longer than 1 s of the processor" in answer.json()["detail"]
    assert client.put("/datasets/mine", content=CONTENT).status_code == 201


def test_nothing_is_checked_for_a_client_that_has_gone(
    settings: Settings, slow_content: bytes
) -> None:
    async def check_both() -> None:
        uploads = Uploads()
        with pytest.raises(ClientDisconnect):
            await check(uploads, settings, "anna", content=slow_content, stays_seconds=0.5)
        await check(uploads, settings, "anna")

    before_seconds = os.times().children_user
    asyncio.run(check_both())
    # The whole check takes four seconds of the processor, the other one less than one.
    assert os.times().children_user - before_seconds < 3


def test_client_that_has_gone_leaves_the_line(settings: Settings) -> None:
    async def leave() -> None:
        uploads = Uploads()
        async with uploads._turns.hold("token anna"):
            with pytest.raises(ClientDisconnect):
                await check(uploads, settings, "bob", stays_seconds=0)
        await check(uploads, settings, "carl")

    asyncio.run(leave())


def test_uploads_are_checked_in_turns_between_clients(settings: Settings) -> None:
    order: list[str] = []

    async def check_one(uploads: Uploads, client: str) -> None:
        await check(uploads, settings, client)
        order.append(client)

    async def check_all() -> None:
        uploads = Uploads()
        names = ("anna", "anna", "anna", "bob")
        await asyncio.gather(*(check_one(uploads, name) for name in names))

    asyncio.run(check_all())
    assert order == ["anna", "anna", "bob", "anna"]


async def check(
    uploads: Uploads,
    settings: Settings,
    client: str,
    *,
    content: bytes = CONTENT,
    stays_seconds: float = 60,
) -> None:
    """Check an upload for a client that closes its connection after some seconds."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(stays_seconds)
        return {"type": "http.disconnect"}

    scope = {"type": "http", "state": {"token_name": client}}
    with open_upload(settings.datasets_dir) as file:
        file.write(content)
        await uploads.check(file, request=Request(scope, receive), fit=Fit(), shown_name="mine.npz")


def test_who_waits_too_long_for_a_check_is_told_when_to_come_back(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.datasets_dir.mkdir()
    (settings.datasets_dir / "mine.npz").write_bytes(CONTENT)
    monkeypatch.setattr(inspection, "MAX_WAIT_SECONDS", 0.1)
    with inspection._checks.take_turn():
        answers = [
            client.get("/datasets/mine"),
            client.post("/jobs", json={"option": "b", "dataset": "mine"}),
            client.put("/datasets/other", content=CONTENT),
        ]
    assert [answer.status_code for answer in answers] == [503] * 3
    assert all("retry-after" in answer.headers for answer in answers)
    assert client.get("/datasets/mine").status_code == 200


def test_few_requests_wait_for_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = inspection._Checks()
    taken = [checks._places.acquire(blocking=False) for _ in range(MAX_WAITING + 1)]
    assert all(taken)
    with pytest.raises(UnavailableError, match=f"{MAX_WAITING} requests wait"), checks.take_turn():
        pass


def test_unchanged_file_is_read_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.datasets_dir.mkdir(parents=True)
    path = settings.datasets_dir / "mine.npz"
    path.write_bytes(CONTENT)
    before = read_contents("mine", datasets_dir=settings.datasets_dir)
    monkeypatch.setattr(inspection, "MAX_CHECK_SECONDS", 0.0)
    assert read_contents("mine", datasets_dir=settings.datasets_dir) is before
    path.write_bytes(make_npz(images=GRIDS + 1))
    with pytest.raises(CheckLimitError):
        read_contents("mine", datasets_dir=settings.datasets_dir)


def test_unchanged_file_that_cannot_be_used_is_read_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.datasets_dir.mkdir(parents=True)
    path = settings.datasets_dir / "mine.npz"
    path.write_bytes(CONTENT[:-30])
    with pytest.raises(DatasetError, match="truncated") as first:
        read_contents("mine", datasets_dir=settings.datasets_dir)
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "MAX_CHECK_SECONDS", 0.0)
        with pytest.raises(DatasetError, match=re.escape(str(first.value))):
            inspection.check_dataset("mine", datasets_dir=settings.datasets_dir)
    path.write_bytes(CONTENT)
    assert read_contents("mine", datasets_dir=settings.datasets_dir).num_grids


def test_check_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    pipe = tmp_path / "mine.npz"
    os.mkfifo(pipe)  # to open it lasts until somebody writes
    with subprocess.Popen(_command_of_check(pipe), stdin=subprocess.PIPE) as check:
        assert check.stdin is not None
        with pytest.raises(subprocess.TimeoutExpired):
            check.wait(timeout=1)
        check.stdin.close()
        assert check.wait(timeout=60) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends this signal")
def test_check_is_ended_with_the_process_that_started_it_whatever_it_does(tmp_path: Path) -> None:
    pipe = tmp_path / "mine.npz"
    os.mkfifo(pipe)
    # The check's standard input stays open, so that only the signal can end it.
    start = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [sys.executable, "-c", start, *_command_of_check(pipe)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        deadline = time.monotonic() + 60
        while not _has_reader(pipe) and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.kill()
        # The output is at its end once nobody holds the other end of it.
        assert select.select([parent.stdout], [], [], 30)[0]


def _has_reader(pipe: Path) -> bool:
    """Whether a process opens a named pipe, and waits for a writer."""
    try:
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # left open: the check then waits for bytes
    except OSError:
        return False
    return True


def _command_of_check(path: Path) -> list[str]:
    task = {"do": "check", "path": str(path), "max_bytes": 2**30, "max_processor_seconds": 60}
    return [sys.executable, "-P", "-m", "server.files.checking", json.dumps(task)]


def test_client_has_some_uploads_at_a_time_and_leaves_the_rest_to_others(
    settings: Settings,
) -> None:
    uploads = Uploads()
    with ExitStack() as stack:

        def enter(client: str) -> None:
            stack.enter_context(uploads.enter(client, settings=settings))

        for _ in range(MAX_UPLOADS_OF_CLIENT):
            enter("token anna")
        with pytest.raises(UnavailableError, match="of yours"):
            enter("token anna")
        for number in range(MAX_UPLOADS - MAX_UPLOADS_OF_CLIENT - 1):
            enter(f"token {number}")
        last = stack.enter_context(ExitStack())
        last.enter_context(uploads.enter("token b", settings=settings))
        # All are complete and wait for their check, so that none has to go.
        with pytest.raises(UnavailableError, match=f"{MAX_UPLOADS} uploads"):
            enter("token c")
        last.close()
        enter("token c")


def test_slowest_upload_of_who_has_most_gives_its_place_to_who_has_none(
    settings: Settings,
) -> None:
    clients = [f"token {number % 3}" for number in range(MAX_UPLOADS - 1)]

    async def fill() -> list[BaseException | None]:
        uploads = Uploads()
        tasks = [
            asyncio.create_task(trickle(uploads, settings, client, num_bytes=num_bytes))
            for client, num_bytes in [*((client, 1000) for client in clients), ("token 1", 1)]
        ]
        await asyncio.sleep(0.1)
        with uploads.enter("token honest", settings=settings) as upload:
            await upload.receive(_send(CONTENT), file=io.BytesIO())
            await asyncio.sleep(0.1)
            done = [task.exception() if task.done() else None for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return done

    found = asyncio.run(fill())
    assert [number for number, error in enumerate(found) if error] == [MAX_UPLOADS - 1]
    assert isinstance(found[-1], UnavailableError)
    assert "slowest" in str(found[-1])


def test_upload_that_trickles_in_is_answered_408(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "GRACE_SECONDS", 0.2)

    async def drip() -> None:
        # Two kilobytes a second, for which alone a body would go on.
        with uploads.enter("token anna", settings=settings) as upload:
            await upload.receive(_send(b"PK", rest=bytes(100), every=0.05), file=io.BytesIO())

    uploads = Uploads()
    with pytest.raises(HTTPException, match="too slowly") as raised:
        asyncio.run(drip())
    assert raised.value.status_code == 408


async def _send(
    first: bytes, *, rest: bytes = b"", every: float | None = None
) -> AsyncIterator[bytes]:
    """A body of one part; with `every`, an endless one, a part in so many seconds."""
    yield first
    while every is not None:
        await asyncio.sleep(every)
        yield rest


async def trickle(uploads: Uploads, settings: Settings, client: str, *, num_bytes: int) -> None:
    """An upload that does not go on after its first bytes."""
    with uploads.enter(client, settings=settings) as upload:
        await upload.receive(_send(bytes(num_bytes), every=60), file=io.BytesIO())


@pytest.mark.parametrize(
    ("limits", "status", "name"),
    [
        ({"max_storage_bytes": 10_000}, 507, "LOSSLAB_MAX_STORAGE_BYTES"),
        ({"max_upload_bytes": 10_000}, 413, "LOSSLAB_MAX_UPLOAD_BYTES"),
    ],
)
def test_upload_that_can_never_fit_is_refused_before_it_arrives(
    settings: Settings, limits: dict[str, int], status: int, name: str
) -> None:
    with open_client(create_app(settings.model_copy(update=limits))) as client:
        headers = {"Content-Length": "10001"}
        answers = [
            client.put("/datasets/mine", content=b"PK", headers=headers),
            client.put("/datasets/mine", content=(bytes(1000) for _ in range(11))),
        ]
    assert [answer.status_code for answer in answers] == [status] * 2
    assert all(name in answer.json()["detail"] for answer in answers)
    assert list(settings.datasets_dir.iterdir()) == []


def test_what_a_killed_process_left_takes_no_space_from_others(
    engine: Engine, settings: Settings
) -> None:
    before = retention.measure_storage(engine, settings)
    for path in (settings.datasets_dir / ".killed.part", settings.cache_dir / "killed.tmp"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    assert retention.measure_storage(engine, settings) == before
    limited = settings.model_copy(update={"max_storage_bytes": before + len(CONTENT)})
    with open_client(create_app(limited)) as client:
        assert client.put("/datasets/mine", content=CONTENT).status_code == 201
