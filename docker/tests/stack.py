"""A stack in a container engine, used through compose and HTTP."""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).parent.parent.parent
COMPOSE = (
    ["docker", "compose"]
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    else ["docker-compose"]
)
#: Its epochs leave time to break something meanwhile.
TINY = {"option": "b", "quick_test": True, "num_samples": 2000}
#: For a job that only has to end.
SHORT = {"num_samples": 400, "epochs": 1}

Json = dict[str, Any]
T = TypeVar("T")


def make_environment(**variables: str) -> dict[str, str]:
    """The environment of a test's stack, with a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return os.environ | {
        "PIP_NO_INDEX": "1",
        "REVISION": "0123abc",
        "LOSSLAB_TAG": "test",
        "LOSSLAB_PORT": str(port),
        "LOSSLAB_LEASE_SECONDS": "6",
        "LOSSLAB_HEARTBEAT_SECONDS": "2",
        **variables,
    }


class Stack:
    """The CPU stack; `up` may be called repeatedly."""

    def __init__(
        self,
        environment: dict[str, str],
        *,
        project: str = "losslab-test",
        override: Path | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._environment = environment
        self.options = ["-p", project, "-f", "docker/compose.cpu.yml"]
        self.options += ["-f", str(override)] if override else []
        url = f"http://127.0.0.1:{environment['LOSSLAB_PORT']}"
        self.http = httpx.Client(base_url=url, timeout=30, headers=headers)

    def with_override(self, override: Path) -> "Stack":
        """The same stack with another compose file on top."""
        project = self.options[1]
        return Stack(self._environment, project=project, override=override)

    def try_to_run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False
        )

    def run(self, *command: str) -> str:
        done = self.try_to_run(*command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def compose(self, *arguments: str) -> str:
        return self.run(*COMPOSE, *self.options, *arguments)

    def up(self, *services: str, num_workers: int = 1) -> float:
        """Start everything, or some services; returns the seconds until the server was ready."""
        started = time.monotonic()
        scale = [] if services else ["--scale", f"worker={num_workers}"]
        self.compose("up", "-d", *scale, *services)
        self.wait_until_ready()
        return time.monotonic() - started

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.get_or_none("/readyz"))

    def get_or_none(self, path: str) -> Json | None:
        try:
            answer = self.http.get(path)
        except httpx.TransportError:
            return None
        return answer.json() if answer.is_success else None

    def post(self, **body: Any) -> str:
        answer = self.http.post("/jobs", json=TINY | body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def wait(self, job_id: str) -> Json:
        """The job once it has ended; the server may be unreachable in between."""
        ended = ("succeeded", "failed", "cancelled")

        def read() -> Json | None:
            job = self.get_or_none(f"/jobs/{job_id}")
            return job if job and job["status"] in ended else None

        return wait_for(read)

    def wait_for_epoch(self, job_id: str) -> Json:
        def read() -> Json | None:
            job = self.get_or_none(f"/jobs/{job_id}")
            return job if job and job["epochs_completed"] else None

        return wait_for(read)

    def read_everything(self) -> dict[str, Json]:
        """Every job with its metrics and pictures, as the API serves them."""
        everything: dict[str, Json] = {}
        for job in self.http.get("/jobs", params={"limit": 100}).json()["data"]:
            url = f"/jobs/{job['id']}"
            pictures = self.http.get(f"{url}/reconstructions").json()["data"]
            files = [self.http.get(picture["url"]).content for picture in pictures]
            assert all(content.startswith(b"\x89PNG") for content in files)
            metrics = self.http.get(f"{url}/metrics").json()
            everything[job["id"]] = {
                "job": job, "metrics": metrics, "pictures": pictures, "files": files
            }  # fmt: skip
        return everything

    def list_containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def list_running(self) -> set[str]:
        containers = [self.inspect(name) for name in self.compose("ps", "-q").split()]
        return {container["Id"] for container in containers if container["State"]["Running"]}

    def inspect(self, name: str) -> Json:
        description: Json = json.loads(self.run("docker", "inspect", name))[0]
        return description

    def wait_until_healthy(self, service: str) -> None:
        def read() -> bool | None:
            states = [self.inspect(name)["State"] for name in self.list_containers(service)]
            return all(state["Health"]["Status"] == "healthy" for state in states) or None

        wait_for(read)


def wait_for(read: Callable[[], T | None], *, seconds: float = 600) -> T:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := read()) is not None:
            return found
        time.sleep(0.3)
    raise TimeoutError


def write_documented_override(folder: Path, *, containing: str) -> Path:
    """The documentation's own example, with paths that are valid outside the repository."""
    pages = "\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
    examples = re.findall(r"```yaml\n(.*?)```", pages, flags=re.DOTALL)
    (example,) = [example for example in examples if containing in example]
    path = folder / "override.yml"
    example = example.replace("file: docker/", f"file: {ROOT}/docker/")
    path.write_text(example.replace("file: secrets/", f"file: {folder}/secrets/"))
    return path
