"""Real processes whose wall clock is set while they run."""

import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fault_worker import wait_for
from preloading import start_under
from test_events import find_free_port
from test_file_systems import answers, read_job

pytestmark = pytest.mark.slow

HOUR = 3600.0
LEASE_SECONDS = 5.0
#: Takes longer than the tests.
LONG_JOB = {"option": "b", "num_samples": 200, "epochs": 1000, "checkpoint_every": 1000}


class Lab:
    """A server and a worker with a clock that can be set."""

    def __init__(self, folder: Path) -> None:
        self._ahead_path = folder / "ahead"
        self.set_ahead(0.0)
        port = find_free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            "LOSSLAB_DATA_DIR": str(folder / "data"),
            "LOSSLAB_LEASE_SECONDS": str(LEASE_SECONDS),
            "LOSSLAB_HEARTBEAT_SECONDS": "0.5",
            "LOSSLAB_RATE_LIMIT": "600/minute",
            "WALL_CLOCK_AHEAD": str(self._ahead_path),
        }
        program = "import sys; from server.cli.main import app; app(sys.argv[1:])"
        self.log_path = folder / "log"
        self.process = start_under(
            "wallclock",
            *("-c", program, "up", "--port", str(port)),
            environment=environment,
            log_path=self.log_path,
        )

    def set_ahead(self, seconds: float) -> None:
        """In place: the processes have mapped the file."""
        is_new = not self._ahead_path.exists()
        with self._ahead_path.open("wb" if is_new else "rb+") as file:
            file.write(struct.pack("d", seconds))

    def submit(self) -> str:
        return str(httpx.post(f"{self.url}/jobs", json=LONG_JOB).json()["id"])

    def read(self, job_id: str) -> dict[str, Any]:
        return read_job(self.url, job_id)

    def read_workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/workers", verify=False).json()["data"]
        return found


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    try:
        wait_for(lambda: answers(lab.url))
        yield lab
    finally:
        lab.process.terminate()
        lab.process.wait(timeout=60)


def test_clock_that_is_set_again_and_again_takes_no_job_and_kills_no_worker(lab: Lab) -> None:
    job_id = lab.submit()
    wait_for(lambda: lab.read(job_id)["epochs_completed"])
    for number, hours in enumerate((1, 2, 24, 3, -2, -24)):
        lab.set_ahead(hours * HOUR)
        # At another moment between two heartbeats each time, and once for longer than a lease.
        end = time.monotonic() + (1.1 * LEASE_SECONDS if number == 2 else 0.8 + number / 7)
        while time.monotonic() < end:
            job = lab.read(job_id)
            assert (job["status"], job["attempt"]) == ("running", 1), lab.log_path.read_text()
            assert job["seconds_left"] is None or job["seconds_left"] >= 0
            # A heartbeat or an epoch may be late, while other tests run.
            (worker,) = lab.read_workers()
            assert worker["state"] in ("busy", "stale", "stalled")
            time.sleep(0.2)


def test_clock_that_is_set_days_ahead_forgets_no_idempotency_key(lab: Lab) -> None:
    body, keyed = {**LONG_JOB, "epochs": 1}, {"Idempotency-Key": "once"}
    first = httpx.post(f"{lab.url}/jobs", json=body, headers=keyed)
    lab.set_ahead(100 * HOUR)
    other = httpx.post(f"{lab.url}/jobs", json=body, headers={"Idempotency-Key": "other"})
    again = httpx.post(f"{lab.url}/jobs", json=body, headers=keyed)
    assert again.json()["id"] == first.json()["id"] != other.json()["id"]


def test_worker_that_dies_after_the_clock_was_set_back_is_noticed(lab: Lab) -> None:
    job_id = lab.submit()
    wait_for(lambda: lab.read(job_id)["epochs_completed"])
    lab.set_ahead(-5 * HOUR)
    time.sleep(1.0)
    (worker,) = lab.read_workers()
    os.kill(worker["pid"], signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for(lambda: lab.read(job_id)["attempt"] == 2)
    assert LEASE_SECONDS / 2 < time.monotonic() - killed_at < 8 * LEASE_SECONDS
