"""Leases: how workers hold and lose them, and when reapers requeue jobs."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta

import psycopg
import pytest
from conftest import BOTH_DATABASES, SubmitJob, read, read_rows
from fault_worker import wait_for
from postgres import Postgres
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, col, select

from server.database.engine import is_outage, write_transaction
from server.jobs import leases, queue
from server.jobs.leases import Lease, LeaseLostError, StopRequest
from server.jobs.reaper import Moment, Reaper
from server.models.tables import Job, JobEvent, JobStatus
from server.settings import Settings
from worker.heartbeat import Heartbeat, StopReason

LEASE_SECONDS = 100.0
BEAT_SECONDS = 10.0
#: Longer than the gap after which a reaper begins to watch anew.
GAP_SECONDS = 80.0
HOUR = 3600.0


class Clocks:
    """What a reaper takes for the time."""

    def __init__(self) -> None:
        self._awake = 1000.0
        self._wall = 5000.0

    def __call__(self) -> Moment:
        return Moment(self._awake, self._wall)

    def advance(self, seconds: float) -> None:
        self._awake += seconds
        self._wall += seconds

    def set_ahead(self, seconds: float) -> None:
        """As somebody who sets the clock does, or a machine that sleeps."""
        self._wall += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """Settings with a lease that no test waits for."""
    return settings.model_copy(
        update={"lease_seconds": LEASE_SECONDS, "heartbeat_seconds": BEAT_SECONDS}
    )


@pytest.fixture
def reaper(patient: Settings, engine: Engine, clocks: Clocks) -> Reaper:
    return Reaper(engine, settings=patient, read_clocks=clocks)


@pytest.fixture
def hasty(settings: Settings) -> Settings:
    """Settings with a short lease."""
    return settings.model_copy(update={"lease_seconds": 1.0, "heartbeat_seconds": 0.1})


def claim(engine: Engine, worker_id: str, *, lease_seconds: float = LEASE_SECONDS) -> Lease:
    job = queue.claim(engine, worker_id=worker_id, lease_seconds=lease_seconds)
    assert job is not None
    return Lease(job.id, job.attempt, worker_id)


def beat(engine: Engine, lease: Lease) -> None:
    leases.heartbeat(engine, lease, lease_seconds=LEASE_SECONDS, progress=0.0)


def reap_for(
    reaper: Reaper,
    seconds: float,
    *,
    clocks: Clocks,
    living: Lease | None = None,
    engine: Engine,
) -> int:
    """Reap as a worker does, while the worker of `living` sends heartbeats."""
    num_lost, end = 0, clocks().awake_seconds + seconds
    while clocks().awake_seconds < end:
        if living is not None:
            beat(engine, living)
        num_lost += reaper.reap()
        clocks.advance(BEAT_SECONDS)
    return num_lost


def set_database_clock_ahead(engine: Engine, seconds: float) -> None:
    """What such a clock makes of the leases: they are so much older."""
    with write_transaction(engine) as session:
        for job in session.exec(select(Job).where(col(Job.lease_expires_at).is_not(None))):
            assert job.lease_expires_at is not None
            job.lease_expires_at -= timedelta(seconds=seconds)


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
def test_request_takes_effect_if_the_worker_died_after_reading_it(
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob, request_stop: object
) -> None:
    assert callable(request_stop)
    job = submit_job()
    claim(engine, "w1")
    assert request_stop(engine, job.id).status is JobStatus.running
    seconds = LEASE_SECONDS + 2 * BEAT_SECONDS
    assert reap_for(reaper, seconds, clocks=clocks, engine=engine) == 1
    assert read(engine, job).status in (JobStatus.cancelled, JobStatus.paused)


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
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = claim(engine, "silent")
    assert reap_for(reaper, LEASE_SECONDS, clocks=clocks, engine=engine) == 0
    assert reap_for(reaper, 2 * BEAT_SECONDS, clocks=clocks, engine=engine) == 1
    with pytest.raises(LeaseLostError):
        beat(engine, lease)


@BOTH_DATABASES
def test_after_an_outage_the_living_keep_their_jobs_and_the_dead_lose_theirs(
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    submit_job()
    living, dead = claim(engine, "living"), claim(engine, "dead")
    reaper.reap()
    # No worker reaches the database for longer than a lease.
    clocks.advance(LEASE_SECONDS + GAP_SECONDS)
    assert reaper.reap() == 0
    seconds = LEASE_SECONDS + 2 * BEAT_SECONDS
    assert reap_for(reaper, seconds, clocks=clocks, living=living, engine=engine) == 1
    assert leases.read_stop_request(engine, living) is None
    with pytest.raises(LeaseLostError):
        leases.read_stop_request(engine, dead)


def test_reaper_that_kept_asking_through_an_outage_takes_no_living_job(
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob
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
        clocks.advance(BEAT_SECONDS)
    assert num_failures > 0
    assert reaper.reap() == 0
    seconds = LEASE_SECONDS + 2 * BEAT_SECONDS
    assert reap_for(reaper, seconds, clocks=clocks, living=living, engine=engine) == 0


@BOTH_DATABASES
def test_reaper_that_is_born_after_an_outage_first_watches_for_a_lease(
    patient: Settings, engine: Engine, clocks: Clocks, submit_job: SubmitJob
) -> None:
    submit_job()
    submit_job()
    living, dead = claim(engine, "living"), claim(engine, "dead")
    set_database_clock_ahead(engine, HOUR)
    newborn = Reaper(engine, settings=patient, read_clocks=clocks)
    assert newborn.is_in_doubt()
    assert reap_for(newborn, LEASE_SECONDS, clocks=clocks, engine=engine) == 0
    seconds = 2 * BEAT_SECONDS
    assert reap_for(newborn, seconds, clocks=clocks, living=living, engine=engine) == 1
    assert not newborn.is_in_doubt()
    with pytest.raises(LeaseLostError):
        leases.read_stop_request(engine, dead)


@BOTH_DATABASES
@pytest.mark.parametrize("hours", [1, -2])
def test_clock_that_is_set_takes_no_job_from_the_living_and_hides_no_death(
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob, hours: float
) -> None:
    submit_job()
    submit_job()
    living, dead = claim(engine, "living"), claim(engine, "dead")
    reaper.reap()
    clocks.set_ahead(hours * HOUR)
    set_database_clock_ahead(engine, hours * HOUR)
    assert reap_for(reaper, LEASE_SECONDS, clocks=clocks, living=living, engine=engine) == 0
    seconds = 2 * BEAT_SECONDS
    assert reap_for(reaper, seconds, clocks=clocks, living=living, engine=engine) == 1
    assert leases.read_stop_request(engine, living) is None
    with pytest.raises(LeaseLostError):
        leases.read_stop_request(engine, dead)


def test_time_in_which_the_machine_slept_is_not_counted(
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    claim(engine, "on a machine that slept too")
    reaper.reap()
    for _ in range(5):
        assert reap_for(reaper, LEASE_SECONDS, clocks=clocks, engine=engine) == 0
        clocks.set_ahead(8 * HOUR)


@contextmanager
def locked_by_others(settings: Settings) -> Iterator[None]:
    """Another program writes to the database: nobody else can, and everybody can read."""
    if settings.database_url:
        with psycopg.connect(settings.database_url) as connection:
            connection.execute("LOCK TABLE job IN EXCLUSIVE MODE")
            yield
        return
    path = settings.data_dir / "losslab.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@BOTH_DATABASES
def test_lock_of_another_program_takes_no_job_from_its_worker(
    engine: Engine, hasty: Settings, submit_job: SubmitJob
) -> None:
    job = submit_job()
    lease = claim(engine, "w1", lease_seconds=hasty.lease_seconds)
    with reaping(engine, settings=hasty) as reaped, beating(lease, engine=engine, settings=hasty):
        for _ in range(4):
            with locked_by_others(hasty):
                time.sleep(1.5 * hasty.lease_seconds)
            # Whoever comes first has the lock next.
            time.sleep(0.3)
        wait_for(reaped.is_set)
    stored = read(engine, job)
    assert (stored.status, stored.num_lost_attempts) == (JobStatus.running, 0)


@contextmanager
def reaping(engine: Engine, *, settings: Settings) -> Iterator[threading.Event]:
    """Several reapers at work, as those of idle workers; the event tells of their last round."""
    ended, has_reaped = threading.Event(), threading.Event()

    def reap() -> None:
        reaper = Reaper(engine, settings=settings)
        while not ended.wait(settings.heartbeat_seconds):
            reaper.reap()
            has_reaped.set()

    threads = [threading.Thread(target=reap) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield has_reaped
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True, scope="session")
def test_database_that_is_read_only_for_a_while_takes_no_job_from_its_worker(
    engine: Engine, clocks: Clocks, reaper: Reaper, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = claim(engine, "w1")
    reaper.reap()
    with read_only(engine):
        for refused in (reaper.reap, lambda: beat(engine, lease)):
            with pytest.raises(DBAPIError) as error:
                refused()
            assert is_outage(error.value)
        clocks.advance(LEASE_SECONDS)
    assert reaper.reap() == 0
    assert leases.read_stop_request(engine, lease) is None


@contextmanager
def read_only(engine: Engine) -> Iterator[None]:
    """As a standby is until it is promoted."""

    def set_read_only(word: str) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            name = connection.exec_driver_sql("SELECT current_database()").scalar()
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(
                f"ALTER DATABASE {name} SET default_transaction_read_only = {word}"
            )
        engine.dispose()

    set_read_only("on")
    try:
        yield
    finally:
        set_read_only("off")


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
