"""The CPU stack in a real container engine, used as a user would. The tests build on each other."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
COMPOSE = (
    ["docker", "compose"]
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    else ["docker-compose"]
)
PROJECT = "losslab-test"
FILES = ["-p", PROJECT, "-f", "docker/compose.cpu.yml"]
TINY = {"option": "b", "quick_test": True, "num_samples": 2000}

Json = dict[str, Any]
T = TypeVar("T")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return os.environ | {
        "PIP_NO_INDEX": "1",
        "TORCH_INDEX_URL": "",
        "LOSSLAB_PORT": str(port),
        "LOSSLAB_LEASE_SECONDS": "6",
    }


class Stack:
    """The running stack; `up` and `down` may be called again and again."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        url = f"http://127.0.0.1:{environment['LOSSLAB_PORT']}"
        self.http = httpx.Client(base_url=url, timeout=30)

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def compose(self, *arguments: str) -> str:
        return self.run(*COMPOSE, *FILES, *arguments)

    def up(self, *, num_workers: int = 1) -> float:
        """Start everything; returns the seconds until the server was ready."""
        started = time.monotonic()
        self.compose("up", "-d", "--scale", f"worker={num_workers}")
        wait_for(lambda: self.get_or_none("/readyz"))
        return time.monotonic() - started

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
        """The job once it has ended; the server may be away in between."""
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

    def list_containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def inspect(self, name: str) -> Json:
        description: Json = json.loads(self.run("docker", "inspect", name))[0]
        return description


def wait_for(read: Callable[[], T | None], *, seconds: float = 300) -> T:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := read()) is not None:
            return found
        time.sleep(0.3)
    raise TimeoutError


@pytest.fixture(scope="session")
def stack(environment: dict[str, str]) -> Iterator[Stack]:
    stack = Stack(environment)
    stack.compose("down", "-v")
    stack.compose("build")
    seconds = stack.up()
    print(f"\nfrom up to ready: {seconds:.1f} s")
    try:
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "40"))
        stack.compose("down", "-v")
        stack.http.close()


@pytest.fixture(scope="session")
def finished(stack: Stack) -> str:
    """A job that has run."""
    job_id = stack.post(name="first")
    assert stack.wait(job_id)["status"] == "succeeded"
    return job_id


@pytest.mark.parametrize("files", [[], ["-f", "docker/compose.cpu.yml"]])
def test_compose_files_are_valid_without_a_warning(files: list[str]) -> None:
    done = subprocess.run(
        [*COMPOSE, *files, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_default_stack_reserves_a_gpu() -> None:
    done = subprocess.run(
        [*COMPOSE, "config"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "driver: nvidia" in done.stdout


def test_server_image_is_small_and_holds_no_torch_and_no_compiler(stack: Stack) -> None:
    image = stack.inspect("losslab-server")
    megabytes = image["Size"] / 1e6
    worker_megabytes = stack.inspect("losslab-worker")["Size"] / 1e6
    print(f"\nserver image {megabytes:.0f} MB, worker image {worker_megabytes:.0f} MB")
    assert megabytes < 300
    look = "command -v gcc cc; python -c 'import torch' 2>/dev/null && echo torch; true"
    assert stack.run("docker", "run", "--rm", "losslab-server", "sh", "-c", look) == ""


@pytest.mark.parametrize("name", ["losslab-server", "losslab-worker"])
def test_images_run_as_nobody_in_particular_and_say_what_they_are(stack: Stack, name: str) -> None:
    config = stack.inspect(name)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.title"].startswith("Losslab")
    assert not [entry for entry in config["Env"] if "PASSWORD" in entry or "TOKEN" in entry]


@pytest.mark.parametrize("service", ["server", "worker"])
def test_containers_can_do_no_more_than_they_must(stack: Stack, service: str) -> None:
    (container,) = stack.list_containers(service)
    host = stack.inspect(container)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["Init"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["Privileged"]


def test_service_is_published_on_loopback_alone(stack: Stack) -> None:
    (container,) = stack.list_containers("server")
    bindings = stack.inspect(container)["HostConfig"]["PortBindings"]
    assert [entry["HostIp"] for entry in bindings["8000/tcp"]] == ["127.0.0.1"]
    (database,) = stack.list_containers("db")
    assert not stack.inspect(database)["HostConfig"]["PortBindings"]


def test_published_service_without_a_token_is_refused(stack: Stack) -> None:
    command = ["run", "--rm", "--no-deps", "-e", "LOSSLAB_PUBLISHED_HOST=0.0.0.0", "server"]
    done = subprocess.run(
        [*COMPOSE, *FILES, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "LOSSLAB_API_TOKEN" in done.stdout + done.stderr


def test_job_is_trained_and_its_picture_and_verdict_are_served(stack: Stack, finished: str) -> None:
    picture = stack.http.get(f"/jobs/{finished}/reconstructions/best.png")
    assert picture.content.startswith(b"\x89PNG")
    verdict = stack.http.get(f"/jobs/{finished}/verdict").json()
    assert len(verdict["criteria"]) == 6
    wait_for(lambda: True if healthy(stack, "worker") else None)


def healthy(stack: Stack, service: str) -> bool:
    states = [
        stack.inspect(name)["State"]["Health"]["Status"] for name in stack.list_containers(service)
    ]
    return all(state == "healthy" for state in states)


def test_job_of_a_killed_worker_goes_on_in_another(stack: Stack) -> None:
    stack.up(num_workers=2)
    job_id = stack.post(epochs=25, name="killed")
    worker_host = stack.wait_for_epoch(job_id)["worker_id"].partition("/")[0]
    stack.run("docker", "kill", worker_host)
    job = stack.wait(job_id)
    assert job["status"] == "succeeded"
    assert job["attempt"] == 2
    assert job["worker_id"].partition("/")[0] != worker_host
    rows = stack.http.get(f"/jobs/{job_id}/metrics").json()["data"]
    assert [row["epoch"] for row in rows] == list(range(1, 26))


def test_restart_of_the_database_costs_no_epoch(stack: Stack) -> None:
    stack.up(num_workers=1)
    job_id = stack.post(epochs=25, name="database")
    stack.wait_for_epoch(job_id)
    stack.compose("restart", "db")
    job = stack.wait(job_id)
    assert job["status"] == "succeeded"
    rows = stack.http.get(f"/jobs/{job_id}/metrics").json()["data"]
    assert [row["epoch"] for row in rows] == list(range(1, 26))


def read_everything(stack: Stack) -> dict[str, object]:
    """Every job with its metrics and the hashes of its pictures, as they are served."""
    everything: dict[str, object] = {}
    for job in stack.http.get("/jobs", params={"limit": 100}).json()["data"]:
        url = f"/jobs/{job['id']}"
        pictures = stack.http.get(f"{url}/reconstructions").json()["data"]
        files = [stack.http.get(picture["url"]).content for picture in pictures]
        assert all(content.startswith(b"\x89PNG") for content in files)
        everything[job["id"]] = (job, stack.http.get(f"{url}/metrics").json(), pictures, files)
    return everything


def test_everything_is_there_after_down_and_up(stack: Stack) -> None:
    before = read_everything(stack)
    assert len(before) >= 3
    stack.compose("down")
    seconds = stack.up()
    print(f"\nfrom up to ready, with data: {seconds:.1f} s")
    assert read_everything(stack) == before


def test_backup_restores_everything(stack: Stack, tmp_path: Path) -> None:
    before = read_everything(stack)
    stack.run("docker/backup.sh", str(tmp_path), *FILES)
    stack.compose("down", "-v")
    stack.up()
    assert read_everything(stack) == {}
    stack.run("docker/restore.sh", str(tmp_path), *FILES)
    wait_for(lambda: stack.get_or_none("/readyz"))
    assert read_everything(stack) == before
    job_id = stack.post(epochs=1)
    assert stack.wait(job_id)["status"] == "succeeded"
    shutil.rmtree(tmp_path)
