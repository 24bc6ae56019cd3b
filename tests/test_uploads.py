"""What an upload may take: memory, time, space, and turns."""

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import open_client
from fastapi.testclient import TestClient
from npz_files import GRIDS, make_npz
from sqlalchemy import Engine

from server.api.uploads import MAX_UPLOADS, MAX_UPLOADS_OF_CLIENT, Uploads
from server.errors import UnavailableError
from server.files import inspection
from server.files.inspection import MAX_WAITING, CheckLimitError, read_contents
from server.files.npz import DatasetError, read_header
from server.jobs import retention
from server.main import create_app
from server.settings import Settings

CONTENT = make_npz(images=GRIDS)
#: Python needs many times as much memory for it.
EMPTY_LISTS = b"[" + b"[]," * 1_000_000 + b"[]]"


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
    monkeypatch.setattr(inspection, "MAX_CHECK_SECONDS", 0.01)
    answer = client.put("/datasets/mine", content=CONTENT)
    assert (answer.status_code, "longer than 0.01 s" in answer.json()["detail"]) == (422, True)


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
    task = f'{{"do": "check", "path": "{pipe}", "max_bytes": {2**30}}}'
    command = [sys.executable, "-P", "-m", "server.files.checking", task]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as check:
        assert check.stdin is not None
        with pytest.raises(subprocess.TimeoutExpired):
            check.wait(timeout=1)
        check.stdin.close()
        assert check.wait(timeout=60) == 1


def test_client_has_some_uploads_at_a_time_and_leaves_the_rest_to_others() -> None:
    uploads = Uploads()
    entered = [uploads.enter("token anna") for _ in range(MAX_UPLOADS_OF_CLIENT)]
    for each in entered:
        each.__enter__()
    with pytest.raises(UnavailableError, match="of yours"), uploads.enter("token anna"):
        pass
    others = [uploads.enter(f"token {n}") for n in range(MAX_UPLOADS - MAX_UPLOADS_OF_CLIENT)]
    for each in others:
        each.__enter__()
    with pytest.raises(UnavailableError, match=f"{MAX_UPLOADS} uploads"), uploads.enter("token b"):
        pass
    others[0].__exit__(None, None, None)
    with uploads.enter("token b"):
        pass


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
