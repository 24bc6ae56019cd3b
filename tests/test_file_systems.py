"""File systems that lack links, syncs, modes or shared memory, as exFAT, SMB and FUSE do."""

import errno
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import TINY
from fault_worker import wait_for
from npz_files import GRIDS, make_npz
from preloading import start_under
from test_events import find_free_port

#: What some file systems refuse, by the words of the report.
STEPS = {
    "link": ("link a file", (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)),
    "dirsync": ("sync a folder", (errno.EINVAL, errno.ENOSYS, errno.EBADF)),
    "filesync": ("sync a file", (errno.EINVAL, errno.ENOSYS)),
    "chmod": ("set the mode", (errno.EPERM, errno.ENOSYS)),
    "advise": ("take advice", (errno.EINVAL, errno.ENOSYS)),
    "sharedmap": ("share memory", (errno.ENODEV, errno.EINVAL)),
}
#: Each step alone, and together by the other numbers that they may be refused with.
REFUSALS = [
    *({step: numbers[0]} for step, (_, numbers) in STEPS.items()),
    *({step: numbers[min(k, len(numbers) - 1)] for step, (_, numbers) in STEPS.items()}
      for k in (1, 2)),
]  # fmt: skip


def use_files(folder: Path, refused: dict[str, int]) -> tuple[int, str]:
    """Exit code and output of `file_user` in the folder."""
    folder.mkdir()
    log_path = folder / "log"
    environment = {
        "REFUSE": " ".join(f"{step}={number}" for step, number in refused.items()),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    program = str(Path(__file__).parent / "file_user.py")
    process = start_under(
        "refuse", program, str(folder), environment=environment, log_path=log_path
    )
    return process.wait(timeout=120), log_path.read_text()


def read_result(folder: Path, refused: dict[str, int]) -> dict[str, Any]:
    code, output = use_files(folder, refused)
    assert code == 0, output
    result: dict[str, Any] = json.loads(output)
    # A data set is taken, known again, and never replaced.
    assert result["taken"] == [True, False, None]
    return result


@pytest.mark.parametrize("refused", REFUSALS, ids=" ".join)
def test_steps_that_a_file_system_lacks_are_reported_once_and_done_without(
    tmp_path: Path, refused: dict[str, int]
) -> None:
    told = read_result(tmp_path / "data", refused)["told"]
    for step in refused:
        of_step = [message for message in told if STEPS[step][0] in message]
        # SQLite does its own syncs.
        assert len(of_step) == (2 if step == "filesync" else 1)
        assert all(str(tmp_path / "data") in message for message in of_step)
    assert len(told) == len(refused) + ("filesync" in refused)


def test_whole_file_system_is_told_nothing_of(tmp_path: Path) -> None:
    assert read_result(tmp_path / "data", {})["told"] == []


@pytest.mark.parametrize("step", ["filesync", "dirsync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_error_of_the_disk_itself_is_not_done_without(
    tmp_path: Path, step: str, number: int
) -> None:
    code, output = use_files(tmp_path / "data", {step: number})
    assert code == 1
    assert f"[Errno {number}]" in output


@pytest.mark.slow
def test_service_works_on_a_file_system_that_lacks_everything(tmp_path: Path) -> None:
    port = find_free_port()
    environment = {
        "LOSSLAB_DATA_DIR": str(tmp_path / "data"),
        "LOSSLAB_MAX_ATTEMPTS": "1",
        "REFUSE": " ".join(f"{step}={STEPS[step][1][0]}" for step in STEPS)
        + f" filemap={errno.ENODEV}",
    }
    program = "import sys; from server.cli.main import app; app(sys.argv[1:])"
    command = ["-c", program, "up", "--port", str(port)]
    log_path, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    process = start_under("refuse", *command, environment=environment, log_path=log_path)
    try:
        wait_for(lambda: answers(url))
        put = httpx.put(f"{url}/datasets/mine", content=make_npz(images=GRIDS.repeat(5, axis=0)))
        assert put.status_code == 201, put.text
        bodies = [TINY | {"option": "b"} | extra for extra in ({"dataset": "mine"}, {}, {})]
        ids = [httpx.post(f"{url}/jobs", json=body).json()["id"] for body in bodies]
        for job_id in ids:
            wait_for(lambda job_id=job_id: read_job(url, job_id)["ended_at"])  # type: ignore[misc]
            job = read_job(url, job_id)
            assert job["status"] == "succeeded", job["error"]
            folder = tmp_path / "data" / "runs" / job_id / "checkpoints"
            best = folder / f"checkpoint_epoch_{job['best_epoch']}.safetensors"
            assert (folder / "best.safetensors").read_bytes() == best.read_bytes()
    finally:
        process.terminate()
        process.wait(timeout=60)
    log = log_path.read_text()
    for words, _ in STEPS.values():  # server and worker each say what they do without
        assert log.count(words) <= (4 if words == "sync a file" else 2), log
    # Generated data is kept, and read by the next job.
    assert "is not kept for the next job" not in log
    assert "will be generated again" not in log


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", verify=False).status_code == 200
    except httpx.TransportError:
        time.sleep(0.2)
        return False


def read_job(url: str, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = httpx.get(f"{url}/jobs/{job_id}", verify=False).json()
    return job
