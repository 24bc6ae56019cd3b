"""Several jobs at the same time in one worker process: each as it is alone, whatever befalls the
others."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import BOTH_DATABASES, MakeSettings, numbers, queue_job, read, read_rows
from fault_worker import QUICK, SHORT_JOB, WorkerProcess, run_worker, wait_for
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.database.engine import database_now, open_database
from server.jobs import queue
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Job, JobEvent, JobStatus, Worker
from server.settings import Settings
from worker.slots import Slots, choose_num_slots

pytestmark = pytest.mark.slow

Numbers = list[dict[str, object]]


@dataclass(frozen=True)
class World:
    settings: Settings
    engine: Engine
    alone: dict[int, Numbers]  #: by seed

    def submit(self, *seeds: int) -> list[Job]:
        return [submit(self.engine, seed) for seed in seeds]

    def read(self, job: Job) -> Job:
        return read(self.engine, job)

    def are_training(self, *jobs: Job) -> bool:
        """Whether all of them have begun at this moment, and none has ended."""
        return all(
            found.status is JobStatus.running and found.progress > 0
            for found in map(self.read, jobs)
        )

    def has_lease(self, *jobs: Job) -> bool:
        with Session(self.engine) as session:
            now = database_now(session)
        ends = [self.read(job).lease_expires_at for job in jobs]
        return any(end is not None and end >= now for end in ends)

    def read_messages(self, job: Job) -> list[str]:
        with Session(self.engine) as session:
            found = select(JobEvent.message).where(JobEvent.job_id == job.id)
            return list(session.exec(found.order_by(col(JobEvent.id))))

    def check_numbers(self, *jobs: Job) -> None:
        """Each has succeeded with the numbers of its seed alone."""
        for job in map(self.read, jobs):
            assert job.status is JobStatus.succeeded, job.error_message
            rows = [numbers(row) for row in read_rows(self.engine, job)]
            assert rows == self.alone[job.training_config.seed]


def submit(engine: Engine, seed: int) -> Job:
    preset = OPTIONS[BuiltInOption.b].config
    config = resolve_config(preset, overrides=SHORT_JOB | {"seed": seed, "data_seed": 0})
    return queue_job(engine, option=BuiltInOption.b, config=config)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings) -> Iterator[World]:
    settings = make_settings(tmp_path_factory.mktemp("slots"), **QUICK)
    engine = open_database(settings)
    jobs = [submit(engine, seed) for seed in range(4)]
    assert run_worker(settings, "--drain") == 0
    alone = {job.config["seed"]: [numbers(row) for row in read_rows(engine, job)] for job in jobs}
    assert all(len(rows) == SHORT_JOB["epochs"] for rows in alone.values())
    several = settings.model_copy(update={"jobs_per_worker": 3})
    yield World(several, engine, alone)
    engine.dispose()


@BOTH_DATABASES
def test_jobs_at_the_same_time_have_the_numbers_of_each_alone(world: World) -> None:
    jobs = world.submit(0, 1, 2, 3)
    with WorkerProcess(world.settings, "--drain", point="paced") as process:
        wait_for(lambda: world.are_training(*jobs[:3]))
        assert world.read(jobs[3]).status is JobStatus.queued
        with Session(world.engine) as session:
            workers = session.exec(select(Worker).where(Worker.pid == process.pid)).all()
        assert {worker.job_id for worker in workers} == {job.id for job in jobs[:3]}
        assert process.wait() == 0
    world.check_numbers(*jobs)
    with Session(world.engine) as session:
        states = session.scalars(select(Worker.state).where(Worker.pid == process.pid)).all()
    assert list(states) == ["stopped"] * 3


def test_request_to_stop_is_followed_by_its_job_alone(world: World) -> None:
    cancelled, paused, other = world.submit(0, 1, 2)
    with WorkerProcess(world.settings, point="paced") as process:
        wait_for(lambda: world.are_training(cancelled, paused, other))
        queue.cancel(world.engine, cancelled.id)
        queue.pause(world.engine, paused.id)
        urgent = submit(world.engine, 3)
        wait_for(lambda: world.read(urgent).status is JobStatus.running)
        assert world.read(other).status is JobStatus.running, "a free slot is enough"
        process.terminate()
        assert process.wait() == 0
    assert [world.read(job).status for job in (cancelled, paused)] == ["cancelled", "paused"]
    assert [world.read(job).status for job in (other, urgent)] == ["queued", "queued"]
    queue.resume(world.engine, paused.id)
    assert run_worker(world.settings, "--drain") == 0
    world.check_numbers(paused, other, urgent)


def test_jobs_of_a_killed_process_all_go_on(world: World) -> None:
    jobs = world.submit(0, 1, 2)
    with WorkerProcess(world.settings, point="paced"):
        wait_for(
            lambda: world.are_training(*jobs) and all(world.read(j).resume_point for j in jobs)
        )
    wait_for(lambda: not world.has_lease(*jobs))
    assert run_worker(world.settings, "--drain") == 0
    world.check_numbers(*jobs)
    assert all("resumed after epoch" in " ".join(world.read_messages(job)) for job in jobs)


def test_job_that_finds_no_memory_goes_on_once_there_is_some(world: World) -> None:
    jobs = world.submit(0, 1, 2)
    with WorkerProcess(world.settings, "--drain", point="out_of_memory") as process:
        assert process.wait() == 0
        assert process.log.count("at most 2 jobs at a time") == 1
    world.check_numbers(*jobs)
    told = [message for job in jobs for message in world.read_messages(job)]
    assert sum("no memory was left beside other jobs" in message for message in told) == 1
    assert [world.read(job).num_lost_attempts for job in jobs] == [0, 0, 0]


def test_jobs_beside_one_whose_device_fails_are_handed_back(world: World) -> None:
    jobs = world.submit(0, 1, 2)
    assert run_worker(world.settings, "--drain", point="device_failure") == 1
    assert all(world.read(job).status is not JobStatus.running for job in jobs)
    assert sum(world.read(job).num_lost_attempts for job in jobs) == 1
    wait_for(lambda: all(world.read(job).status is JobStatus.queued for job in jobs))
    assert run_worker(world.settings, "--drain") == 0
    world.check_numbers(*jobs)


def test_error_of_one_slot_ends_all_and_is_raised() -> None:
    shutdown, entered = threading.Event(), threading.Barrier(3)

    def work() -> None:
        if entered.wait() == 0:
            raise LookupError("of one")
        assert shutdown.wait(60)

    with pytest.raises(LookupError, match="of one"):
        Slots(3, shutdown=shutdown).run(work)


def test_last_slot_is_never_given_up() -> None:
    slots = Slots(3, shutdown=threading.Event())
    assert [slots.give_up_one() for _ in range(4)] == [True, True, False, False]


def test_slot_is_not_given_up_once_the_others_have_ended() -> None:
    slots, entered, answers = (
        Slots(3, shutdown=threading.Event()),
        threading.Barrier(3),
        list[bool](),
    )

    def work() -> None:
        if entered.wait() == 0:
            wait_for(lambda: sum(t.name.startswith("slot ") for t in threading.enumerate()) == 1)
            answers.append(slots.give_up_one())

    slots.run(work)
    assert answers == [False]


def test_one_job_at_a_time_on_a_cpu_unless_told_otherwise(settings: Settings) -> None:
    assert choose_num_slots(settings) == 1
    assert choose_num_slots(settings.model_copy(update={"jobs_per_worker": 5})) == 5
