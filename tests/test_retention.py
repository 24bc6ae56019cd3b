"""What is deleted when space is needed, what always stays, and the time limit of a job."""

import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import (
    TINY,
    MakeSettings,
    SubmitJob,
    copy_settings,
    drain,
    open_client,
    queue_job,
    read,
    read_artifacts,
)
from fastapi.testclient import TestClient
from fault_worker import wait_for
from npz_files import GRIDS, make_npz
from sqlalchemy import Engine

from server.database.engine import open_database
from server.files.artifacts import JobFiles
from server.jobs import queue, retention
from server.main import create_app
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import ArtifactKind, FailureKind, Job, JobStatus
from server.settings import Settings
from worker.main import work


def checkpoint_epochs(engine: Engine, job: Job) -> list[int]:
    kept = [a.epoch for a in read_artifacts(engine, job) if a.kind is ArtifactKind.checkpoint]
    return sorted(kept)


def needed_epochs(engine: Engine, job: Job) -> list[int]:
    """The best by loss and by likelihood, and the newest."""
    row = read(engine, job)
    assert row.best_epoch is not None
    assert row.best_likelihood_epoch is not None
    return sorted({row.best_epoch, row.best_likelihood_epoch, row.epochs_completed})


def limit(settings: Settings, num_bytes: int) -> Settings:
    return settings.model_copy(update={"max_storage_bytes": num_bytes})


class Original(NamedTuple):
    """A data directory to be copied, and the jobs that ran there."""

    settings: Settings
    jobs: list[Job]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings) -> Original:
    settings = make_settings(tmp_path_factory.mktemp("original") / "experiments", retry_seconds=0.1)
    engine = open_database(settings)
    config = resolve_config(OPTIONS[BuiltInOption.b].config, overrides=TINY | {"epochs": 5})
    jobs = [queue_job(engine, option=BuiltInOption.b, config=config) for _ in range(2)]
    drain(settings, engine)
    engine.dispose()
    return Original(settings, jobs)


@pytest.fixture
def settings(
    tmp_path: Path, make_settings: MakeSettings, request: pytest.FixtureRequest
) -> Settings:
    if "trained" in request.fixturenames:
        original: Original = request.getfixturevalue("original")
        return copy_settings(original.settings, tmp_path / "experiments")
    return make_settings(tmp_path / "experiments", retry_seconds=0.1)


@pytest.fixture
def trained(original: Original) -> list[Job]:
    """Two jobs of five checkpoints each, the older first."""
    return original.jobs


def test_oldest_checkpoints_go_until_the_rest_fits(
    settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    older, newer = trained
    in_use = sum(a.size_bytes for job in trained for a in read_artifacts(engine, job))
    files = JobFiles(settings.runs_dir, older.id)
    first = min(set(range(1, 6)) - set(needed_epochs(engine, older)))
    assert retention.free_space(engine, limit(settings, in_use - 1)) == 1
    assert checkpoint_epochs(engine, older) == [e for e in range(1, 6) if e != first]
    assert checkpoint_epochs(engine, newer) == [1, 2, 3, 4, 5]
    with pytest.raises(FileNotFoundError):
        files.path(f"checkpoint_epoch_{first}.safetensors")
    assert retention.free_space(engine, limit(settings, in_use - 1)) == 0


def test_what_a_resume_needs_and_all_pictures_stay(
    settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    retention.free_space(engine, limit(settings, 1))
    for job in trained:
        assert checkpoint_epochs(engine, job) == needed_epochs(engine, job)
        pictures = [
            artifact
            for artifact in read_artifacts(engine, job)
            if artifact.kind is ArtifactKind.reconstruction
        ]
        assert len(pictures) == 5
    queue.resume(engine, trained[0].id, num_epochs=6)
    drain(settings, engine)
    assert read(engine, trained[0]).status == JobStatus.succeeded
    assert read(engine, trained[0]).epochs_completed == 6


def test_pinned_job_keeps_everything_until_it_is_unpinned(
    client: TestClient, settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    older, newer = trained
    pinned = client.patch(f"/jobs/{older.id}", json={"is_pinned": True}).raise_for_status()
    assert pinned.json()["is_pinned"]
    retention.free_space(engine, limit(settings, 1))
    assert checkpoint_epochs(engine, older) == [1, 2, 3, 4, 5]
    assert checkpoint_epochs(engine, newer) == needed_epochs(engine, newer)
    client.patch(f"/jobs/{older.id}", json={"is_pinned": False}).raise_for_status()
    retention.free_space(engine, limit(settings, 1))
    assert checkpoint_epochs(engine, older) == needed_epochs(engine, older)


def test_service_frees_space_automatically(
    settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    with open_client(create_app(limit(settings, 1))):
        wait_for(
            lambda: all(
                checkpoint_epochs(engine, job) == needed_epochs(engine, job) for job in trained
            )
        )


def test_data_sets_count_and_none_is_taken_when_the_space_is_used_up(
    settings: Settings, engine: Engine
) -> None:
    content = make_npz(images=GRIDS)
    before = retention.measure_storage(engine, settings)
    with open_client(create_app(limit(settings, before + len(content)))) as client:
        assert client.put("/datasets/first", content=content).status_code == 201
        assert retention.measure_storage(engine, settings) == before + len(content)
        refused = client.put("/datasets/second", content=content)
    assert refused.status_code == 507
    assert "LOSSLAB_MAX_STORAGE_BYTES" in refused.json()["detail"]
    assert [path.name for path in settings.datasets_dir.iterdir()] == ["first.npz"]


def test_generated_data_goes_before_any_checkpoint_and_for_a_data_set(
    settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    in_use = retention.measure_storage(engine, settings)
    assert list(settings.cache_dir.iterdir())
    with open_client(create_app(limit(settings, in_use))) as client:
        assert client.put("/datasets/first", content=make_npz(images=GRIDS)).status_code == 201
        assert list(settings.cache_dir.iterdir()) == []
    assert checkpoint_epochs(engine, trained[0]) == [1, 2, 3, 4, 5]


def test_job_that_has_not_ended_keeps_everything(
    settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    queue.resume(engine, trained[0].id, num_epochs=6)
    retention.free_space(engine, limit(settings, 1))
    assert checkpoint_epochs(engine, trained[0]) == [1, 2, 3, 4, 5]


def test_removed_checkpoint_is_no_longer_offered(
    client: TestClient, settings: Settings, engine: Engine, trained: list[Job]
) -> None:
    retention.free_space(engine, limit(settings, 1))
    listed = client.get(f"/jobs/{trained[0].id}/checkpoints").json()["data"]
    assert [entry["epoch"] for entry in listed] == needed_epochs(engine, trained[0])
    (gone, *_) = set(range(1, 6)) - set(needed_epochs(engine, trained[0]))
    answer = client.get(f"/jobs/{trained[0].id}/checkpoints/{gone}")
    assert answer.status_code == 404
    assert "there are best, latest" in answer.json()["detail"]


def test_job_that_trains_too_long_fails_and_goes_on_when_resumed(
    settings: Settings, submit_job: SubmitJob
) -> None:
    short = settings.model_copy(update={"max_job_seconds": 1.0, "heartbeat_seconds": 0.1})
    engine = open_database(settings)
    job = submit_job(epochs=1000)
    drain(short, engine)
    ended = read(engine, job)
    assert (ended.status, ended.failure_kind) == (JobStatus.failed, FailureKind.timeout)
    assert "LOSSLAB_MAX_JOB_SECONDS" in (ended.error_message or "")
    queue.resume(engine, job.id)
    shutdown = threading.Event()
    worker = threading.Thread(
        target=work, args=(settings,), kwargs={"engine": engine, "shutdown": shutdown}
    )
    worker.start()
    while read(engine, job).epochs_completed <= ended.epochs_completed:
        time.sleep(0.05)
    shutdown.set()
    worker.join()
    assert read(engine, job).attempt == 2
    engine.dispose()
