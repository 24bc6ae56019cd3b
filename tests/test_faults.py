"""Jobs whose workers are killed, frozen, stopped or broken end like undisturbed ones."""

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from conftest import (
    BOTH_DATABASES,
    MakeSettings,
    numbers,
    queue_job,
    read,
    read_artifacts,
    read_rows,
)
from fault_worker import QUICK, SHORT_JOB, WorkerProcess, run_worker, wait_for
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.database.engine import database_now, open_database
from server.files.artifacts import JobFiles
from server.files.hashes import compute_sha256
from server.jobs import queue
from server.models.configuration import resolve_config
from server.models.epochs import EpochMetrics
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import ArtifactKind, Job, JobEvent, JobStatus, Worker
from server.settings import Settings

pytestmark = [BOTH_DATABASES, pytest.mark.slow]

#: How often each killed job keeps a checkpoint.
KILLED = {
    "claimed": 1,
    "mid_batch": 2,
    "mid_checkpoint_write": 1,
    "file_without_row": 2,
    "checkpoint_without_row": 1,
    "row_without_status": 2,
}
STOPPED = ["paused", "cancelled", "terminated"]
INTERRUPTED = [*KILLED, *STOPPED, "terminated_twice", "device_failure"]
EXTENDED_EPOCHS = 4


class Fault(NamedTuple):
    """The result of a fault: the worker's exit code and log, and the job's row."""

    exit_code: int | None
    log: str
    left: Job


class World(NamedTuple):
    """A data directory and a database, without a worker between two steps of a test."""

    settings: Settings
    engine: Engine

    def submit(self, **overrides: object) -> Job:
        config = resolve_config(OPTIONS[BuiltInOption.b].config, overrides=SHORT_JOB | overrides)
        return queue_job(self.engine, option=BuiltInOption.b, config=config)

    def read(self, job: Job) -> Job:
        return read(self.engine, job)

    def rows(self, job: Job) -> list[EpochMetrics]:
        return read_rows(self.engine, job)

    def numbers(self, job: Job) -> list[dict[str, object]]:
        return [numbers(row) for row in self.rows(job)]

    def messages(self, job: Job) -> list[str]:
        with Session(self.engine) as session:
            messages = select(JobEvent.message).where(JobEvent.job_id == job.id)
            return list(session.exec(messages.order_by(col(JobEvent.id))))

    def files(self, job: Job) -> JobFiles:
        return JobFiles(self.settings.runs_dir, job.id)

    def read_worker(self, process: WorkerProcess) -> Worker:
        with Session(self.engine) as session:
            return session.exec(select(Worker).where(Worker.pid == process.pid)).one()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings) -> Iterator[World]:
    settings = make_settings(tmp_path_factory.mktemp("faults"), **QUICK)
    engine = open_database(settings)
    yield World(settings, engine)
    engine.dispose()


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Job:
    """A finished job that was then resumed with more epochs."""
    job = world.submit(checkpoint_every=2)
    assert run_worker(world.settings, "--drain") == 0
    return world.read(job)


@pytest.fixture(scope="module")
def reference(world: World, undisturbed: Job) -> list[EpochMetrics]:
    """The rows of the finished job before it was resumed."""
    rows = world.rows(undisturbed)
    assert [row.epoch for row in rows] == [1, 2, 3]
    return rows


@pytest.fixture(scope="module")
def faults(world: World, undisturbed: Job, reference: list[EpochMetrics]) -> dict[str, Fault]:
    """The results of every fault by name, after one worker has finished all the jobs."""
    met = stop_jobs(world)
    with ThreadPoolExecutor(max_workers=2) as pool:
        met |= zip(KILLED, pool.map(lambda point: break_worker(world, point), KILLED), strict=True)
        twice = pool.submit(terminate_twice, world)
        met["device_failure"] = break_worker(world, "device_failure")
        met["terminated_twice"] = twice.result()
    for name in ("paused", "cancelled"):
        queue.resume(world.engine, met[name].left.id)
    queue.resume(world.engine, undisturbed.id, num_epochs=EXTENDED_EPOCHS)
    wait_for(lambda: all(is_given_up(world, fault.left) for fault in met.values()))
    assert run_worker(world.settings, "--drain") == 0
    return met


def stop_jobs(world: World) -> dict[str, Fault]:
    """The result of a request to stop a job and then its worker."""
    met = {}
    with WorkerProcess(world.settings, point="paced") as process:
        for name, request in (("paused", queue.pause), ("cancelled", queue.cancel)):
            job = submit_and_await_resume_point(world)
            request(world.engine, job.id)
            left = wait_until_left(world, job)
            met[name] = Fault(None, process.log, left)
        job = submit_and_await_resume_point(world)
        process.terminate()
        met["terminated"] = Fault(process.wait(), process.log, world.read(job))
    return met


def submit_and_await_resume_point(world: World) -> Job:
    job = world.submit(checkpoint_every=2)
    wait_for(lambda: world.read(job).resume_point)
    return job


def wait_until_left(world: World, job: Job) -> Job:
    wait_for(lambda: world.read(job).status not in (JobStatus.queued, JobStatus.running))
    return world.read(job)


def break_worker(world: World, point: str) -> Fault:
    job = world.submit(checkpoint_every=KILLED.get(point, 1))
    with WorkerProcess(world.settings, "--job", job.id, point=point) as process:
        return Fault(process.wait(), process.log, world.read(job))


def terminate_twice(world: World) -> Fault:
    job = world.submit(checkpoint_every=1)
    with WorkerProcess(world.settings, "--job", job.id, point="slow_step") as process:
        wait_for(lambda: "this step takes three leases" in process.log)
        wait_for(lambda: is_ended_by_a_signal_more(process))
        return Fault(process.wait(), process.log, world.read(job))


def is_ended_by_a_signal_more(process: WorkerProcess) -> bool:
    """Send one more signal; signals before the first was handled would count as one."""
    process.terminate()
    return not process.is_alive


def is_given_up(world: World, left: Job) -> bool:
    """Whether the next worker may claim the job at once."""
    job = world.read(left)
    with Session(world.engine) as session:
        now = database_now(session)
    if job.status is JobStatus.running:
        assert job.lease_expires_at is not None
        return job.lease_expires_at < now
    return job.available_at is None or job.available_at <= now


def assert_only_named_files(world: World, submitted: Job) -> None:
    """The job's files are those of its rows, as they were written, and the best epoch's."""
    job, files = world.read(submitted), world.files(submitted)
    artifacts = read_artifacts(world.engine, job)
    for artifact in artifacts:
        assert compute_sha256(files.path(artifact.file_name)) == artifact.sha256
    best = {
        "best.safetensors": f"checkpoint_epoch_{job.best_epoch}.safetensors",
        "reconstructions_best.png": f"reconstructions_epoch_{job.best_epoch}.png",
    }
    for link, name in best.items():
        assert files.path(link).read_bytes() == files.path(name).read_bytes()
    on_disk = {path.name for path in files.checkpoints_dir.iterdir()}
    assert on_disk == {artifact.file_name for artifact in artifacts} | set(best)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_job_ends_with_the_rows_of_an_undisturbed_one(
    world: World, reference: list[EpochMetrics], faults: dict[str, Fault], name: str
) -> None:
    job = world.read(faults[name].left)
    assert job.status is JobStatus.succeeded, job.error_message
    assert world.numbers(job) == [numbers(row) for row in reference]


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_job_leaves_only_files_that_rows_name(
    world: World, faults: dict[str, Fault], name: str
) -> None:
    job = world.read(faults[name].left)
    assert_only_named_files(world, job)
    epochs = {a.epoch for a in read_artifacts(world.engine, job) if a.kind == "checkpoint"}
    every = job.training_config.checkpoint_every
    bests = {job.best_epoch, job.best_likelihood_epoch}
    assert epochs == {epoch for epoch in (1, 2, 3) if epoch % every == 0} | {3} | bests


@pytest.mark.parametrize("name", INTERRUPTED)
def test_second_attempt_finishes_and_keeps_the_epochs_of_the_first(
    world: World, faults: dict[str, Fault], name: str
) -> None:
    job = world.read(faults[name].left)
    assert (faults[name].left.attempt, job.attempt) == (1, 2)
    attempts = [row.attempt for row in world.rows(job)]
    num_first = faults[name].left.epochs_completed
    assert attempts == [1] * num_first + [2] * (3 - num_first)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_second_attempt_says_from_where_it_goes_on_if_a_state_was_saved(
    world: World, faults: dict[str, Fault], name: str
) -> None:
    left = faults[name].left
    resumed = [text for text in world.messages(left) if text.startswith("resumed after epoch")]
    assert [text for text in resumed if not text.endswith("on request")] == describe_state(left)


def describe_state(left: Job) -> list[str]:
    if left.resume_point is None:
        return [f"resumed after epoch {left.epochs_completed}"] if left.epochs_completed else []
    step = left.resume_point["step"]
    of_epoch = f", step {step} of 15" if step else ""
    return [f"resumed after epoch {left.resume_point['epoch']}{of_epoch}"]


@pytest.mark.parametrize("point", KILLED)
def test_job_of_a_killed_worker_is_requeued_when_its_lease_has_run_out(
    world: World, faults: dict[str, Fault], point: str
) -> None:
    fault = faults[point]
    assert fault.exit_code == -signal.SIGKILL, fault.log
    assert fault.left.status is JobStatus.running
    lost = f"requeued: worker {fault.left.worker_id} sent no heartbeat for 1.5 s"
    assert world.messages(fault.left).count(lost) == 1
    assert world.read(fault.left).num_lost_attempts == 1


def test_faults_happen_at_their_point(faults: dict[str, Fault]) -> None:
    epochs = {name: fault.left.epochs_completed for name, fault in faults.items()}
    assert epochs["claimed"] == epochs["mid_checkpoint_write"] == epochs["file_without_row"] == 0
    assert epochs["checkpoint_without_row"] == 1
    assert epochs["row_without_status"] == 3
    for name in ("mid_checkpoint_write", "file_without_row", *STOPPED):
        assert faults[name].left.resume_point is not None
    assert faults["claimed"].left.resume_point is None


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_job_has_saved_where_it_was(
    world: World, faults: dict[str, Fault], name: str
) -> None:
    fault = faults[name]
    assert fault.left.status is JobStatus(name if name != "terminated" else "queued"), fault.log
    assert fault.left.resume_point is not None
    assert fault.left.epochs_completed < 3
    assert fault.left.num_lost_attempts == world.read(fault.left).num_lost_attempts == 0


@pytest.mark.parametrize("name", ["paused", "cancelled"])
def test_paused_or_cancelled_job_says_so_and_who_let_it_go_on(
    world: World, faults: dict[str, Fault], name: str
) -> None:
    left = faults[name].left
    messages = world.messages(left)
    assert f"{name} on request" in messages
    assert f"resumed after epoch {left.epochs_completed} on request" in messages


def test_terminated_worker_hands_its_job_back(world: World, faults: dict[str, Fault]) -> None:
    fault = faults["terminated"]
    assert fault.exit_code == 0, fault.log
    messages = world.messages(fault.left)
    assert any(re.fullmatch(r"requeued: worker \S+ was stopped", text) for text in messages)


def test_second_sigterm_ends_a_worker_in_mid_step(world: World, faults: dict[str, Fault]) -> None:
    fault = faults["terminated_twice"]
    assert fault.exit_code == 128 + signal.SIGTERM, fault.log
    assert fault.left.status is JobStatus.running


def test_broken_device_ends_its_worker_and_requeues_the_job(
    world: World, faults: dict[str, Fault]
) -> None:
    fault = faults["device_failure"]
    assert fault.exit_code == 1, fault.log
    assert fault.left.status is JobStatus.queued
    requeued = (
        "requeued: the device failed: CUDA error: an illegal memory access was encountered; "
        "next attempt in 0.1 s"
    )
    assert requeued in world.messages(fault.left)
    assert "this worker ends, and another must be started" in fault.log


def test_succeeded_job_goes_on_for_more_epochs_and_keeps_those_it_has(
    world: World, undisturbed: Job, reference: list[EpochMetrics], faults: dict[str, Fault]
) -> None:
    job, rows = world.read(undisturbed), world.rows(undisturbed)
    assert (job.status, job.epochs_completed) == (JobStatus.succeeded, EXTENDED_EPOCHS)
    assert rows[:3] == reference
    assert [(row.epoch, row.attempt) for row in rows[3:]] == [(4, 2)]
    assert_only_named_files(world, job)


@pytest.fixture(scope="module")
def neighbour(world: World, faults: dict[str, Fault]) -> Iterator[WorkerProcess]:
    """An idle worker, frozen so that it claims no job too early."""
    with WorkerProcess(world.settings) as process:
        wait_for(lambda: "waits for jobs" in process.log)
        process.freeze()
        yield process
        process.thaw()
        process.terminate()
        assert process.wait() == 0, process.log


def test_step_of_three_leases_is_no_silence(
    world: World, reference: list[EpochMetrics], neighbour: WorkerProcess
) -> None:
    submitted = world.submit(checkpoint_every=2)
    with WorkerProcess(world.settings, "--job", submitted.id, point="slow_step") as process:
        wait_for(lambda: world.read(submitted).attempt == 1)
        neighbour.thaw()
        assert process.wait() == 0, process.log
        assert "this step takes three leases" in process.log
    neighbour.freeze()
    job = world.read(submitted)
    assert (job.status, job.attempt) == (JobStatus.succeeded, 1)
    assert not any(text.startswith("requeued") for text in world.messages(job))
    assert world.numbers(job) == [numbers(row) for row in reference]


def test_frozen_worker_that_comes_back_writes_nothing_more_and_lives_on(
    world: World, neighbour: WorkerProcess
) -> None:
    job = world.submit(num_samples=200, epochs=1000, checkpoint_every=1000)
    with WorkerProcess(world.settings) as frozen:
        wait_for(lambda: world.rows(job))
        frozen.freeze()
        neighbour.thaw()
        wait_for(lambda: world.rows(job)[-1].attempt == 2)
        taken_over_at = world.rows(job)[-1].epoch
        frozen.thaw()
        wait_for(lambda: re.search("taken from worker|belongs to another worker", frozen.log))
        wait_for(lambda: world.read_worker(frozen).state == "idle")
        wait_for_epochs(world, job, more=2)
        queue.cancel(world.engine, job.id)
        wait_until_left(world, job)
        neighbour.freeze()
        frozen.terminate()
        assert frozen.wait() == 0, frozen.log
    assert_second_attempt_took_over(world, job, from_epoch=taken_over_at)


@pytest.mark.parametrize("point", ["frozen_first_sweep", "frozen_later_sweep"])
def test_worker_that_freezes_while_it_removes_files_removes_none_of_its_heir(
    world: World, reference: list[EpochMetrics], neighbour: WorkerProcess, point: str
) -> None:
    job = world.submit(checkpoint_every=1)
    files = world.files(job)
    files.create()
    # The first sweep means to remove it, and the heir writes its own under this name.
    (files.checkpoints_dir / "checkpoint_epoch_2.safetensors").write_text("of a killed worker")
    with WorkerProcess(world.settings, "--job", job.id, point=point) as frozen:
        frozen.wait_until_frozen()
        neighbour.thaw()
        wait_for(lambda: world.read(job).status is JobStatus.succeeded)
        neighbour.freeze()
        frozen.thaw()
        assert frozen.wait() == 0, frozen.log
    assert world.read(job).attempt == 2
    assert world.numbers(job) == [numbers(row) for row in reference]
    assert_only_named_files(world, job)


def test_files_that_vanish_before_they_are_named_are_written_again(
    world: World, reference: list[EpochMetrics], neighbour: WorkerProcess
) -> None:
    job = world.submit(checkpoint_every=1)
    assert run_worker(world.settings, "--job", job.id, point="lost_files") == 0
    assert (world.read(job).status, world.read(job).attempt) == (JobStatus.succeeded, 1)
    assert world.numbers(job) == [numbers(row) for row in reference]
    assert_only_named_files(world, job)
    kept = {(a.kind, a.epoch) for a in read_artifacts(world.engine, job)}
    assert kept == {(kind, epoch) for kind in ArtifactKind for epoch in (1, 2, 3)}


def wait_for_epochs(world: World, job: Job, *, more: int) -> None:
    num_epochs = len(world.rows(job)) + more
    wait_for(lambda: len(world.rows(job)) >= num_epochs)


def assert_second_attempt_took_over(world: World, submitted: Job, *, from_epoch: int) -> None:
    job, rows = world.read(submitted), world.rows(submitted)
    assert (job.status, job.attempt) == (JobStatus.cancelled, 2)
    assert [row.epoch for row in rows] == list(range(1, len(rows) + 1))
    assert {row.attempt for row in rows[from_epoch - 1 :]} == {2}
    for artifact in read_artifacts(world.engine, job):
        path = world.files(job).path(artifact.file_name)
        assert compute_sha256(path) == artifact.sha256
