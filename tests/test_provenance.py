"""What is recorded of the program, the machine and the client that made a job."""

import io
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SubmitJob, drain, read
from fastapi.testclient import TestClient
from rich.console import Console
from sqlalchemy import Engine
from sqlmodel import Session, select

import server
from server.cli.views import job_view
from server.database.engine import write_transaction
from server.environment.source import find_source
from server.jobs import queue, records
from server.jobs.leases import Lease
from server.models.provenance import Provenance
from server.models.tables import Job, JobEvent
from server.settings import Settings

TRAINED = Provenance(losslab_version="0.1.0", torch_version="2.13.0", source_sha256="a" * 64)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with one commit of both packages."""
    for name in ("server", "worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"NAME = {name!r}\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    who = ("-c", "user.name=A User", "-c", "user.email=user@localhost")
    git(tmp_path, *who, "commit", "--quiet", "--message", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_checkout_is_known_by_its_commit(checkout: Path) -> None:
    source = find_source(checkout)
    assert source.revision == git(checkout, "rev-parse", "HEAD")
    assert source.is_changed is False
    assert len(source.sha256) == 64


def test_local_edit_shows_in_the_digest_and_the_mark(checkout: Path) -> None:
    before = find_source(checkout)
    (checkout / "worker" / "__init__.py").write_text("NAME = 'mine'\n")
    after = find_source(checkout)
    assert (after.revision, after.is_changed) == (before.revision, True)
    assert after.sha256 != before.sha256


def test_new_file_is_an_edit_and_files_beside_the_packages_are_none(checkout: Path) -> None:
    before = find_source(checkout)
    (checkout / "notes.py").write_text("")
    assert find_source(checkout) == before
    (checkout / "worker" / "extra.py").write_text("")
    assert find_source(checkout).is_changed is True


def test_folder_without_git_has_a_digest_and_no_commit(checkout: Path) -> None:
    known = find_source(checkout)
    (checkout / ".git").rename(checkout / "git")
    source = find_source(checkout)
    assert (source.sha256, source.revision) == (known.sha256, None)


def test_checkout_is_that_of_the_program_and_not_of_the_environment(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = find_source(checkout)
    monkeypatch.setenv("GIT_DIR", str(checkout / "elsewhere"))
    assert find_source(checkout) == known


def test_broken_checkout_has_no_commit(checkout: Path) -> None:
    (checkout / ".git" / "HEAD").unlink()
    assert find_source(checkout).revision is None


def test_job_records_what_trained_it(
    settings: Settings, engine: Engine, submit_job: SubmitJob, client: TestClient
) -> None:
    job = submit_job(epochs=1)
    assert client.get(f"/jobs/{job.id}").json()["provenance"] is None
    drain(settings, engine)
    made_by = client.get(f"/jobs/{job.id}").json()["provenance"]
    source = find_source(Path(server.__file__).parents[1])
    assert (made_by["source_sha256"], made_by["revision"]) == (source.sha256, source.revision)
    assert made_by["torch_version"] == torch.__version__
    assert made_by["numpy_version"] == np.__version__
    assert made_by["device"] == read(engine, job).device
    assert made_by["number_format"] in ("bfloat16", "float32")
    assert made_by["step_path"] in ("plain", "graph", "compiled")
    assert made_by["host"]
    assert made_by["worker_id"]
    page = client.get(f"/ui/jobs/{job.id}").text
    assert made_by["source_sha256"] in page
    assert made_by["torch_version"] in page
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as shown:
        console.print(job_view(client.get(f"/jobs/{job.id}").json()))
    assert f"torch {made_by['torch_version']}" in shown.get()


def test_attempt_that_goes_on_with_another_program_says_how_it_differs(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    begin(engine, job, provenance=TRAINED, progress=0.0)
    begin(engine, job, provenance=TRAINED, progress=0.5)
    assert read_warnings(engine, job) == []
    other = TRAINED.model_copy(update={"torch_version": "2.14.0", "source_sha256": "b" * 64})
    begin(engine, job, provenance=other, progress=0.5)
    assert read_warnings(engine, job) == [
        f"this attempt has source code {'b' * 12} instead of {'a' * 12}, torch 2.14.0 instead of "
        "2.13.0"
    ]
    begin(engine, job, provenance=TRAINED, progress=0.0)
    assert len(read_warnings(engine, job)) == 1, "it started over"


def begin(engine: Engine, job: Job, *, provenance: Provenance, progress: float) -> None:
    """An attempt that begins to train, and is handed back."""
    claimed = queue.claim(engine, worker_id="w", lease_seconds=60)
    assert claimed is not None
    lease = Lease(claimed.id, attempt=claimed.attempt, worker_id="w")
    values: dict[str, Any] = {"device": "cpu", "dataset_summary": {}, "warnings": []}
    records.record_start(engine, lease, provenance=provenance, progress=progress, **values)
    queue.hand_back(engine, lease, reason="a test")


def read_warnings(engine: Engine, job: Job) -> list[str]:
    chosen = select(JobEvent.message).where(JobEvent.job_id == job.id, JobEvent.kind == "warning")
    with Session(engine) as session:
        return list(session.exec(chosen))


def test_job_and_study_say_which_program_posted_them(client: TestClient) -> None:
    headers = {"User-Agent": "my script/1.0\x1b[31m" + "x" * 300}
    body = {"option": "b", "quick_test": True}
    job = client.post("/jobs", json=body, headers=headers).json()
    assert job["client"].startswith("my script/1.0")
    assert "\x1b" not in job["client"]
    assert len(job["client"]) < 300
    body = {"options": ["a"], "seeds": [1], "quick_test": True}
    study = client.post("/studies", json=body, headers={"User-Agent": "mine"}).json()
    (of_study,) = client.get("/jobs", params={"limit": 1}).json()["data"]
    assert (of_study["study_id"], of_study["client"]) == (study["id"], "mine")


def test_job_of_another_version_has_what_is_known_of_it(
    engine: Engine, submit_job: SubmitJob, client: TestClient
) -> None:
    job = submit_job()
    stored = {"losslab_version": "9.0", "of_a_later_version": 1}
    with write_transaction(engine) as session:
        session.get_one(Job, job.id).provenance = stored
    made_by = client.get(f"/jobs/{job.id}").json()["provenance"]
    assert (made_by["losslab_version"], made_by["torch_version"]) == ("9.0", "")
    assert client.get(f"/ui/jobs/{job.id}").status_code == 200
