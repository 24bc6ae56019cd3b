"""Leases: how workers hold and lose them, and when reapers requeue jobs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import pytest
from conftest import BOTH_DATABASES, SubmitJob, read, read_rows
from fault_worker import wait_for
from postgres import Postgres
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, col, select

from server.database.engine import database_now, is_outage, write_transaction
from server.jobs import leases, queue
from server.jobs.leases import Lease, LeaseLostError, StopRequest
from server.jobs.reaper import Reaper
from server.models.tables import Job, JobEvent, JobStatus
from server.settings import Settings
from worker.heartbeat import Heartbeat, StopReason

LEASE_SECONDS = 100.0
BEAT_SECONDS = 10.0
#: Longer than the gap after which a reaper waits.
GAP_SECONDS = 80.0


class Clock:
    """What a reaper takes for the time; leases run by the same."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds
        with write_transaction(self._engine) as session:
            for job in session.exec(select(Job).where(col(Job.lease_expires_at).is_not(None))):
                assert job.lease_expires_at is not None
                job.lease_expires_at -= timedelta(seconds=seconds)


@pytest.fixture
def clock(engine: Engine) -> Clock:
    return Clock(engine)


@pytest.fixture
def reaper(settings: Settings, engine: Engine, clock: Clock) -> Reaper:
    settings = settings.model_copy(
        update={"lease_seconds": LEASE_SECONDS, "heartbeat_seconds": BEAT_SECONDS}
    )
    return Reaper(engine, settings=settings, clock=clock)


@pytest.fixture
def hasty(settings: Settings) -> Settings:
    """Settings with a short lease."""
    return settings.model_copy(update={"lease_seconds": 1.0, "heartbeat_seconds": 0.1})


def claim(engine: Engine, worker_id: str, *, lease_seconds: float = LEASE_SECONDS) -> Lease:
    job = queue.claim(engine, worker_id=worker_id, lease_seconds=lease_seconds)
    assert job is not None
    return Lease(job.id, job.attempt, worker_id)


def expire(engine: Engine, lease: Lease) -> None:
    with write_transaction(engine) as session:
        job = session.get_one(Job, lease.job_id)
        job.lease_expires_at = database_now(session) - timedelta(seconds=1)


def reap_for(
    reaper: Reaper, seconds: float, *, clock: Clock, beat: Lease | None = None, engine: Engine
) -> int:
    """Reap as a worker does, while the worker of `beat` sends heartbeats."""
    num_lost, end = 0, clock() + seconds
    while clock() < end:
        if beat is not None:
            leases.heartbeat(engine, beat, lease_seconds=LEASE_SECONDS, progress=0.0)
        num_lost += reaper.reap()
        clock.advance(BEAT_SECONDS)
    return num_lost


def rename_table(engine: Engine, name: str, new_name: str) -> None:
    with write_transaction(engine) as session:
        session.connection().exec_driver_sql(f"ALTER TABLE {name} RENAME TO {new_name}")


@contextmanager
def beating(lease: Lease, *, engine: Engine, settings: Settings) -> Iterator[Heartbeat]:
    shutdown, reaper = threading.Event(), Reaper(engine, settings=settings)
    heartbeat = Heartbeat(lease, engine=engine, settings=settings, shutdown=shutdown, reaper=reaper)
    with heartbeat:
        yield heartbeat


@BOTH_DATABASES
@pytest.mark.parametrize("request_stop", [queue.cancel, queue.pause])
def test_repeated_request_takes_effect_if_the_worker_died_after_reading_it(
    engine: Engine, submit_job: SubmitJob, request_stop: object
) -> None:
    assert callable(request_stop)
    submit_job()
    lease = claim(engine, "w1", lease_seconds=30)
    assert request_stop(engine, lease.job_id).status is JobStatus.running
    expire(engine, lease)
    assert request_stop(engine, lease.job_id).status in (JobStatus.cancelled, JobStatus.paused)


@BOTH_DATABASES
def test_second_request_of_a_living_job_is_no_second_event(
    engine: Engine, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = claim(engine, "w1", lease_seconds=30)
    queue.cancel(engine, lease.job_id)
    queue.cancel(engine, lease.job_id)
    with Session(engine) as session:
        kinds = select(JobEvent.kind).where(col(JobEvent.kind) == "cancel_requested")
        assert len(session.exec(kinds).all()) == 1


@BOTH_DATABASES
def test_job_of_a_silent_worker_is_taken(
    engine: Engine, clock: Clock, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = claim(engine, "silent")
    assert reap_for(reaper, LEASE_SECONDS, clock=clock, engine=engine) == 0
    assert reap_for(reaper, 2 * BEAT_SECONDS, clock=clock, engine=engine) == 1
    with pytest.raises(LeaseLostError):
        leases.heartbeat(engine, lease, lease_seconds=LEASE_SECONDS, progress=0.0)


@BOTH_DATABASES
def test_after_an_outage_the_living_keep_their_jobs_and_the_dead_lose_theirs(
    engine: Engine, clock: Clock, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    submit_job()
    living, dead = claim(engine, "living"), claim(engine, "dead")
    # No worker reaches the database until both leases have expired.
    clock.advance(LEASE_SECONDS + GAP_SECONDS)
    assert reaper.reap() == 0
    seconds = LEASE_SECONDS + 2 * BEAT_SECONDS
    assert reap_for(reaper, seconds, clock=clock, beat=living, engine=engine) == 1
    assert leases.read_stop_request(engine, living) is None
    with pytest.raises(LeaseLostError):
        leases.read_stop_request(engine, dead)


def test_reaper_that_kept_asking_through_an_outage_takes_no_living_job(
    engine: Engine, clock: Clock, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    living = claim(engine, "living")
    num_failures = 0
    for _ in range(round((LEASE_SECONDS + GAP_SECONDS) / BEAT_SECONDS)):
        rename_table(engine, "job", "away")
        try:
            reaper.reap()
        except DBAPIError:
            num_failures += 1
        rename_table(engine, "away", "job")
        clock.advance(BEAT_SECONDS)
    assert num_failures > 0
    assert reaper.reap() == 0
    seconds = LEASE_SECONDS + 2 * BEAT_SECONDS
    assert reap_for(reaper, seconds, clock=clock, beat=living, engine=engine) == 0


def is_renewed(engine: Engine, job: Job, *, after: datetime) -> bool:
    expires_at = read(engine, job).lease_expires_at
    return expires_at is not None and expires_at > after


@BOTH_DATABASES
def test_job_that_stops_keeps_its_lease_until_its_state_is_saved(
    engine: Engine, hasty: Settings, submit_job: SubmitJob
) -> None:
    job = submit_job()
    lease = claim(engine, "w1", lease_seconds=hasty.lease_seconds)
    queue.cancel(engine, lease.job_id)
    with beating(lease, engine=engine, settings=hasty) as heartbeat:
        wait_for(lambda: heartbeat.stop_reason is StopReason.requested)
        heard_at = read(engine, job).lease_expires_at
        assert heard_at is not None
        reaper = Reaper(engine, settings=hasty)
        # By then the lease that it had would be over.
        lease_ends = heard_at + timedelta(seconds=hasty.lease_seconds)
        wait_for(lambda: reaper.reap() or is_renewed(engine, job, after=lease_ends))
        assert read(engine, job).status is JobStatus.running
    assert leases.read_stop_request(engine, lease) is StopRequest.cancel
    assert read_rows(engine, job) == []


def test_idle_transaction_that_postgresql_ended_counts_as_an_outage(
    postgres: Postgres,
) -> None:
    url = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
    options = {"options": "-c idle_in_transaction_session_timeout=100ms"}
    engine = create_engine(url, connect_args=options)
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        time.sleep(0.5)
        with pytest.raises(DBAPIError) as ended:
            connection.execute(text("SELECT 1"))
        assert is_outage(ended.value)
    engine.dispose()
