"""Files of killed processes are removed once nobody can need them."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
from conftest import BOTH_DATABASES, SubmitJob, drain, read, read_artifacts
from sqlalchemy import Engine

from server.files.artifacts import JobFiles
from server.files.datasets import NEW_SUFFIX, open_upload
from server.jobs import queue
from server.jobs.leases import Lease
from server.jobs.orphans import MIN_AGE_SECONDS, OrphanSweep
from server.models.tables import FailureKind, Job, JobStatus
from server.settings import Settings

pytestmark = BOTH_DATABASES


@pytest.fixture
def sweep(settings: Settings, engine: Engine) -> OrphanSweep:
    return OrphanSweep(engine, settings)


def leave(path: Path, *, age_seconds: float = 2 * MIN_AGE_SECONDS) -> Path:
    """A file of a process that was killed so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half a checkpo")
    written_at = time.time() - age_seconds
    os.utime(path, (written_at, written_at))
    return path


def lose(engine: Engine, job: Job) -> None:
    """Let the job fail with its last attempt."""
    claimed = queue.claim(engine, worker_id="killed", lease_seconds=30, job_id=job.id)
    assert claimed is not None
    lease = Lease(job.id, claimed.attempt, "killed")
    queue.fail(engine, lease, code="x", message="killed", kind=FailureKind.infrastructure)
    assert read(engine, job).status is JobStatus.failed


def folder_of(settings: Settings, job: Job) -> Path:
    return JobFiles(settings.runs_dir, job.id).checkpoints_dir


def test_what_a_last_attempt_left_is_removed_and_what_rows_name_stays(
    settings: Settings, engine: Engine, submit_job: SubmitJob, sweep: OrphanSweep
) -> None:
    job = submit_job()
    drain(settings, engine)
    folder = folder_of(settings, job)
    for path in list(folder.iterdir()):  # all are old
        os.utime(path, (0, 0))
    before = {path.name for path in folder.iterdir()}
    names = (".half.safetensors", "resume_attempt_1_epoch_1_step_7.safetensors")
    orphans = [leave(folder / name) for name in (*names, "checkpoint_epoch_9.safetensors")]
    assert [sweep.run(), sweep.run(), sweep.run()] == [0, len(orphans), 0]
    assert {path.name for path in folder.iterdir()} == before
    for artifact in read_artifacts(engine, job):
        JobFiles(settings.runs_dir, job.id).verified_path(
            artifact.file_name, sha256=artifact.sha256
        )


def test_temporary_files_of_uploads_and_of_generated_data_are_removed(
    settings: Settings, sweep: OrphanSweep
) -> None:
    with open_upload(settings.datasets_dir) as upload:
        living = Path(upload.name)
        leave(living.with_name(f".killed{living.suffix}"))
        leave(settings.cache_dir / "tmpkilled.tmp")
        kept = leave(settings.cache_dir / "atomic-v1-100-seed1.npy")
        os.utime(living, (0, 0))
        assert [sweep.run(), sweep.run()] == [2, 0]
        assert living.exists()
    assert kept.exists()
    assert list(settings.datasets_dir.iterdir()) == []


def test_upload_of_a_killed_server_is_removed_at_the_next_start(
    settings: Settings, sweep: OrphanSweep
) -> None:
    with open_upload(settings.datasets_dir) as upload:
        living = Path(upload.name)
        killed = leave(living.with_name(f".killed{living.suffix}"), age_seconds=0)
        assert sweep.run() == 1
        assert (living.exists(), killed.exists()) == (True, False)


def test_upload_that_may_not_be_marked_yet_is_left_alone(
    settings: Settings, sweep: OrphanSweep
) -> None:
    new = leave(settings.datasets_dir / f".begun{NEW_SUFFIX}", age_seconds=60)
    assert [sweep.run(), new.exists()] == [0, True]
    leave(new)
    assert [sweep.run(), new.exists()] == [1, False]


def test_upload_on_a_file_system_without_locks_is_removed_only_when_it_is_old(
    settings: Settings, sweep: OrphanSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_upload(settings.datasets_dir) as upload:
        path = Path(upload.name)
        assert [sweep.run(), sweep.run()] == [0, 0]
        os.utime(path, (0, 0))
        assert [sweep.run(), path.exists()] == [0, True]
        assert [sweep.run(), path.exists()] == [1, False]


def test_files_of_jobs_that_go_on_are_left_to_their_attempts(
    settings: Settings, engine: Engine, submit_job: SubmitJob, sweep: OrphanSweep
) -> None:
    queued, running = submit_job(), submit_job()
    queue.claim(engine, worker_id="w1", lease_seconds=30, job_id=running.id)
    kept = [leave(folder_of(settings, job) / ".half.safetensors") for job in (queued, running)]
    assert [sweep.run(), sweep.run()] == [0, 0]
    assert all(path.exists() for path in kept)


def test_files_of_jobs_that_the_database_does_not_know_are_left_alone(
    settings: Settings, sweep: OrphanSweep
) -> None:
    folder = JobFiles(settings.runs_dir, "0123456789ab").checkpoints_dir
    kept = [
        leave(folder / name) for name in (".half.safetensors", "checkpoint_epoch_1.safetensors")
    ]
    assert [sweep.run(), sweep.run()] == [0, 0]
    assert all(path.exists() for path in kept)


def test_clock_that_is_set_ahead_makes_no_orphan_of_what_is_being_written(
    settings: Settings, engine: Engine, submit_job: SubmitJob, sweep: OrphanSweep
) -> None:
    job = submit_job()
    lose(engine, job)
    # A clock that was set a day ahead makes every file a day old.
    path = leave(folder_of(settings, job) / ".half.safetensors", age_seconds=24 * 3600)
    assert sweep.run() == 0
    leave(path, age_seconds=24 * 3600 - 1)  # its process goes on writing
    assert sweep.run() == 0
    assert path.exists()
    assert sweep.run() == 1


def test_young_file_may_be_of_a_worker_that_does_not_know_that_it_lost_its_job(
    settings: Settings, engine: Engine, submit_job: SubmitJob, sweep: OrphanSweep
) -> None:
    job = submit_job()
    lose(engine, job)
    path = leave(folder_of(settings, job) / ".half.safetensors", age_seconds=60)
    assert [sweep.run(), sweep.run()] == [0, 0]
    assert path.exists()
