"""The compose files, and the documentation's examples of overrides."""

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from stack import COMPOSE, ROOT, Stack, make_environment, write_documented_override

DATABASE_PASSWORD = secrets.token_hex(16)
TOKEN = secrets.token_hex(16)


def read_config(*options: str, **variables: str) -> str:
    done = subprocess.run(
        [*COMPOSE, *options, "config"],
        cwd=ROOT,
        env=make_environment(**variables),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("files", [[], ["-f", "docker/compose.cpu.yml"]])
def test_compose_files_are_valid_without_a_warning(files: list[str]) -> None:
    assert read_config(*files)


def test_default_stack_reserves_a_gpu() -> None:
    assert "driver: nvidia" in read_config()


def test_number_of_workers_and_trusted_proxies_are_settings() -> None:
    config = read_config(LOSSLAB_NUM_WORKERS="3", LOSSLAB_TRUSTED_PROXIES="172.16.0.0/12")
    assert "scale: 3" in config
    assert "LOSSLAB_TRUSTED_PROXIES: 172.16.0.0/12" in config


@pytest.mark.parametrize("files", [[], ["-f", "docker/compose.cpu.yml"]])
def test_memory_processes_and_temporary_files_of_every_service_are_bounded(
    files: list[str],
) -> None:
    services = yaml.safe_load(read_config(*files))["services"]
    assert set(services) == {"db", "server", "worker"}
    for service in services.values():
        assert service["mem_limit"]
        assert service["pids_limit"]
        assert all("size=" in each for each in service.get("tmpfs", []))


def test_documented_second_gpu_gets_a_worker_of_its_own(tmp_path: Path) -> None:
    override = write_documented_override(tmp_path, containing="device_ids")
    config = read_config("-f", "docker-compose.yml", "-f", str(override))
    assert "worker-1:" in config
    assert config.count("driver: nvidia") == 2


@pytest.fixture(scope="module")
def guarded_stack(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with token and password in secret files and a single allowed host name."""
    folder = tmp_path_factory.mktemp("guarded")
    folder.joinpath("secrets").mkdir(mode=0o700)
    folder.joinpath("secrets/api_token").write_text(TOKEN + "\n")
    folder.joinpath("secrets/database_password").write_text(DATABASE_PASSWORD + "\n")
    override = write_documented_override(folder, containing="secrets:")
    guarded_stack = Stack(
        make_environment(LOSSLAB_ALLOWED_HOSTS="lab.example"),
        project="losslab-test-guarded",
        override=override,
        headers={"Host": "lab.example", "Authorization": f"Bearer {TOKEN}"},
    )
    stack.compose("stop")  # two stacks at a time are slow
    try:
        guarded_stack.up("server")
        yield guarded_stack
    finally:
        guarded_stack.compose("down", "-v")
        guarded_stack.http.close()


def test_server_that_answers_to_one_name_and_wants_a_token_is_healthy(guarded_stack: Stack) -> None:
    guarded_stack.wait_until_healthy("server")


def test_token_comes_from_a_secret_file(guarded_stack: Stack) -> None:
    url = guarded_stack.http.base_url.join("/jobs")
    assert httpx.get(url, headers={"Host": "lab.example"}).status_code == 401
    assert guarded_stack.http.get("/jobs").status_code == 200


@pytest.mark.parametrize(
    ("password", "is_let_in"),
    [(DATABASE_PASSWORD, True), ("losslab", False)],
    ids=["from the file", "default"],
)
def test_database_password_comes_from_a_secret_file(
    guarded_stack: Stack, password: str, is_let_in: bool
) -> None:
    # Only connections from outside the database's container need a password.
    command = ["exec", "-T", "-e", f"PGPASSWORD={password}", "db"]
    query = ["psql", "-h", "db", "-U", "losslab", "-d", "losslab", "-c", "SELECT 1"]
    done = guarded_stack.try_to_run(*COMPOSE, *guarded_stack.options, *command, *query)
    assert (done.returncode == 0) == is_let_in, done.stderr
    assert is_let_in or "password authentication failed" in done.stderr


def test_documented_secrets_are_in_no_environment(guarded_stack: Stack) -> None:
    for name in guarded_stack.compose("ps", "-q").split():
        environment = json.dumps(guarded_stack.inspect(name)["Config"]["Env"])
        assert TOKEN not in environment
        assert DATABASE_PASSWORD not in environment
