"""A server and a worker as separate processes, which a test may stop and restart."""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks
import httpx
from conftest import TINY
from forks import Fork
from test_events import find_free_port, wait_until_it_answers


@dataclass
class Service:
    """A server and a worker, each a process that can be stopped alone."""

    data_dir: Path
    token: str = ""
    port: int = field(default_factory=find_free_port)
    environment: dict[str, str] = field(default_factory=dict)
    log_path: Path | None = None
    processes: dict[str, Fork] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def datasets_dir(self) -> Path:
        return self.data_dir / "datasets"

    def start(self, *names: str) -> None:
        commands = {"server": ["losslab", "serve", "--port", str(self.port)], "worker": ["worker"]}
        environment = os.environ | {
            "LOSSLAB_DATA_DIR": str(self.data_dir),
            "LOSSLAB_API_TOKEN": self.token,
            "LOSSLAB_POLL_SECONDS": "0.05",
            "LOSSLAB_HEARTBEAT_SECONDS": "1",
            "LOSSLAB_NUM_WORKERS": "2",  # one thread: the browser needs a core, too
        }
        environment |= self.environment
        for name in names:
            with open(self.log_path or os.devnull, "ab") as log:
                self.processes[name] = forks.start(
                    *commands[name], environment=environment, stdout=log, stderr=log
                )
        wait_until_it_answers(f"{self.url}/healthz")

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(timeout=40)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        answer = httpx.post(
            f"{self.url}{path}", json=body, headers=headers, timeout=30, verify=False
        )
        job: dict[str, Any] = answer.raise_for_status().json()
        return job

    def train(self, option: str, **body: Any) -> dict[str, Any]:
        """Post a tiny job."""
        return self.post("/jobs", option=option, **TINY | body)

    def wait(self, job_id: str, *, status: str = "succeeded") -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            job: dict[str, Any] = httpx.get(
                f"{self.url}/jobs/{job_id}", timeout=30, verify=False
            ).json()
            if job["status"] == status:
                return job
            time.sleep(0.1)
        raise TimeoutError(f"job {job_id} is {job['status']}, not {status}")
