"""The CPU stack in a real container engine. The tests depend on each other's order."""

from datetime import UTC, datetime

import pytest
from stack import COMPOSE, Stack


def test_server_image_is_small_and_holds_no_torch_and_no_compiler(stack: Stack) -> None:
    megabytes = stack.inspect("losslab-server:test")["Size"] / 1e6
    worker_megabytes = stack.inspect("losslab-worker-cpu:test")["Size"] / 1e6
    print(f"\nserver image {megabytes:.0f} MB, worker image {worker_megabytes:.0f} MB")
    # scipy, which decides between arms, brings 94 of them, fonts for all scripts 12.
    assert megabytes < 410
    look = "command -v gcc cc; python -c 'import torch' 2>/dev/null && echo torch; true"
    assert stack.run("docker", "run", "--rm", "losslab-server:test", "sh", "-c", look) == ""


def test_worker_image_holds_what_a_worker_imports_compiled(stack: Stack) -> None:
    command = ["docker", "run", "--rm", "losslab-worker-cpu:test", "python", "-v", "-c"]
    done = stack.try_to_run(*command, "import psycopg, server.cli, worker.main")
    assert done.returncode == 0
    assert "code object from '/opt/losslab/bytecode/" in done.stderr
    assert "code object from /" not in done.stderr


@pytest.mark.parametrize("name", ["losslab-server:test", "losslab-worker-cpu:test"])
def test_images_run_as_a_user_without_rights_and_have_labels(stack: Stack, name: str) -> None:
    config = stack.inspect(name)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.title"].startswith("Losslab")
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
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
    assert host["Memory"]
    assert host["PidsLimit"]
    assert host["Tmpfs"]["/tmp"].startswith("size=")


@pytest.mark.parametrize("password", ["losslab", "postgres", "password"])
def test_database_takes_no_default_password(stack: Stack, password: str) -> None:
    # Only connections from outside the database's container need one.
    command = ["exec", "-T", "-e", f"PGPASSWORD={password}", "db"]
    query = ["psql", "-h", "db", "-U", "losslab", "-d", "losslab", "-c", "SELECT 1"]
    done = stack.try_to_run(*COMPOSE, *stack.options, *command, *query)
    assert done.returncode != 0
    assert "password authentication failed" in done.stderr


def test_service_is_published_on_loopback_alone(stack: Stack) -> None:
    (container,) = stack.list_containers("server")
    bindings = stack.inspect(container)["HostConfig"]["PortBindings"]
    assert [entry["HostIp"] for entry in bindings["8000/tcp"]] == ["127.0.0.1"]
    (database,) = stack.list_containers("db")
    assert not stack.inspect(database)["HostConfig"]["PortBindings"]


def test_published_service_without_a_token_is_refused(stack: Stack) -> None:
    command = ["run", "--rm", "--no-deps", "-e", "LOSSLAB_PUBLISHED_HOST=0.0.0.0", "server"]
    done = stack.try_to_run(*COMPOSE, *stack.options, *command)
    assert done.returncode == 1
    assert "LOSSLAB_API_TOKEN" in done.stdout + done.stderr


def test_job_is_trained_and_its_picture_and_verdict_are_served(stack: Stack, finished: str) -> None:
    picture = stack.http.get(f"/jobs/{finished}/reconstructions/best.png")
    assert picture.content.startswith(b"\x89PNG")
    verdict = stack.http.get(f"/jobs/{finished}/verdict").json()
    assert len(verdict["criteria"]) == 6


def test_job_can_be_posted_from_within_the_stack(stack: Stack) -> None:
    command = ["exec", "-T", "server", "losslab", "submit", "--option", "b", "--quick-test"]
    output = stack.compose(*command, "--num-samples", "400", "--epochs", "1", "--wait")
    (newest, *_) = stack.http.get("/jobs").json()["data"]
    assert newest["id"] in output
    assert newest["status"] == "succeeded"


def test_job_of_a_killed_worker_goes_on_in_another(stack: Stack) -> None:
    stack.up(num_workers=2)
    job_id = stack.post(epochs=8, name="killed")
    worker_host = stack.wait_for_epoch(job_id)["worker_id"].partition("/")[0]
    stack.run("docker", "kill", worker_host)
    job = stack.wait(job_id)
    assert job["status"] == "succeeded"
    assert job["attempt"] == 2
    assert job["worker_id"].partition("/")[0] != worker_host
    rows = stack.http.get(f"/jobs/{job_id}/metrics").json()["data"]
    assert [row["epoch"] for row in rows] == list(range(1, 9))


def test_restart_of_the_database_costs_no_epoch(stack: Stack) -> None:
    stack.up(num_workers=1)
    job_id = stack.post(epochs=15, name="database")
    stack.wait_for_epoch(job_id)
    stack.compose("restart", "db")
    restarted_at = datetime.now(UTC)
    job = stack.wait(job_id)
    assert job["status"] == "succeeded"
    assert datetime.fromisoformat(job["ended_at"]) > restarted_at
    rows = stack.http.get(f"/jobs/{job_id}/metrics").json()["data"]
    assert [row["epoch"] for row in rows] == list(range(1, 16))


def test_worker_is_healthy(stack: Stack) -> None:
    # Its health is checked every minute, which has passed by now.
    stack.wait_until_healthy("worker")


def test_everything_is_there_after_down_and_up(stack: Stack) -> None:
    before = stack.read_everything()
    assert len(before) >= 3
    stack.compose("down")
    seconds = stack.up()
    print(f"\nfrom up to ready, with data: {seconds:.1f} s")
    assert stack.read_everything() == before
