"""Every transition of a job."""

import threading
from datetime import timedelta

import pytest
from conftest import SubmitJob
from sqlalchemy import Engine
from sqlmodel import Session, select

from server import job_queue
from server.database import write_transaction
from server.job_queue import JobStateError, Lease, LeaseLostError, QueueFullError
from server.models import FailureKind, Job, JobEvent, JobStatus, Option, TrainingConfig, utc_now


def claim(engine: Engine, worker_id: str = "w1") -> Job | None:
    return job_queue.claim(engine, worker_id=worker_id, lease_seconds=30)


def lease_of(job: Job | None) -> Lease:
    assert job is not None
    assert job.worker_id is not None
    return Lease(job.id, job.attempt, job.worker_id)


def read(engine: Engine, job_id: str) -> Job:
    with Session(engine) as session:
        return session.exec(select(Job).where(Job.id == job_id)).one()


def events(engine: Engine, job_id: str) -> list[str]:
    with Session(engine) as session:
        return list(session.exec(select(JobEvent.kind).where(JobEvent.job_id == job_id)))


def expire_lease(engine: Engine, job_id: str) -> None:
    with write_transaction(engine) as session:
        session.get_one(Job, job_id).lease_expires_at = utc_now() - timedelta(seconds=1)


def test_submitted_job_is_queued_and_on_disk(engine: Engine, submit_job: SubmitJob) -> None:
    job = submit_job("b")
    stored = read(engine, job.id)
    assert stored.status is JobStatus.queued
    assert stored.option is Option.b
    assert stored.created_at.utcoffset() == timedelta(0)
    assert events(engine, job.id) == ["queued"]


def test_claim_takes_priority_first_and_then_age(engine: Engine, submit_job: SubmitJob) -> None:
    old, new = submit_job(), submit_job()
    urgent = submit_job(priority=5)
    claimed = [claim(engine) for _ in range(4)]
    assert [job and job.id for job in claimed] == [urgent.id, old.id, new.id, None]


def test_claim_starts_an_attempt_with_a_lease(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    job = claim(engine)
    assert job is not None
    assert (job.status, job.attempt, job.worker_id) == (JobStatus.running, 1, "w1")
    assert job.lease_expires_at is not None
    assert job.lease_expires_at > utc_now()


def test_claim_of_one_job_leaves_the_others(engine: Engine, submit_job: SubmitJob) -> None:
    first, second = submit_job(), submit_job()
    taken = job_queue.claim(engine, worker_id="w1", lease_seconds=30, job_id=second.id)
    assert taken is not None
    assert taken.id == second.id
    assert read(engine, first.id).status is JobStatus.queued


def test_competing_threads_claim_every_job_once(engine: Engine, submit_job: SubmitJob) -> None:
    submitted = {submit_job().id for _ in range(30)}
    claimed: list[str] = []

    def compete(worker_id: str) -> None:
        while job := claim(engine, worker_id):
            claimed.append(job.id)

    threads = [threading.Thread(target=compete, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(submitted)


def test_heartbeat_renews_the_lease(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    job = claim(engine)
    assert job is not None
    job_queue.heartbeat(engine, lease_of(job), lease_seconds=600, progress=0.5)
    stored = read(engine, job.id)
    assert stored.progress == 0.5
    assert stored.lease_expires_at is not None
    assert stored.lease_expires_at > utc_now() + timedelta(seconds=500)


def test_finished_job_has_succeeded(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    job_queue.finish(engine, lease, test_metrics={"loss": 1.0})
    job = read(engine, lease.job_id)
    assert (job.status, job.progress, job.test_metrics) == (JobStatus.succeeded, 1.0, {"loss": 1.0})
    assert job.ended_at is not None
    assert events(engine, job.id) == ["queued", "running", "succeeded"]


def test_failed_job_says_why(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    job_queue.fail(engine, lease, code="x", message="because", kind=FailureKind.user)
    job = read(engine, lease.job_id)
    assert (job.status, job.error_message) == (JobStatus.failed, "because")
    assert job.failure_kind is FailureKind.user


def test_lost_job_goes_to_another_worker_and_fences_the_first(
    engine: Engine, submit_job: SubmitJob
) -> None:
    submit_job()
    zombie = lease_of(claim(engine, "zombie"))
    expire_lease(engine, zombie.job_id)
    assert job_queue.requeue_lost_jobs(engine, max_attempts=3) == 1
    heir = claim(engine, "heir")
    assert heir is not None
    assert heir.attempt == 2
    for write in (
        lambda: job_queue.heartbeat(engine, zombie, lease_seconds=30, progress=1.0),
        lambda: job_queue.is_cancel_requested(engine, zombie),
        lambda: job_queue.finish(engine, zombie, test_metrics={}),
        lambda: job_queue.fail(engine, zombie, code="", message="", kind=FailureKind.user),
        lambda: job_queue.hand_back(engine, zombie, reason=""),
        lambda: job_queue.acknowledge_cancel(engine, zombie),
        lambda: job_queue.add_event(engine, zombie, kind="warning", message=""),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert read(engine, heir.id).worker_id == "heir"


def test_live_lease_is_not_requeued(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    claim(engine)
    assert job_queue.requeue_lost_jobs(engine, max_attempts=3) == 0


def test_job_that_loses_every_worker_fails_in_the_end(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    for _ in range(3):
        claim(engine)
        expire_lease(engine, job_id)
        job_queue.requeue_lost_jobs(engine, max_attempts=3)
    job = read(engine, job_id)
    assert job.status is JobStatus.failed
    assert job.failure_kind is FailureKind.infrastructure


def test_handing_back_is_no_lost_attempt(engine: Engine, submit_job: SubmitJob) -> None:
    job_id = submit_job().id
    for _ in range(5):
        job_queue.hand_back(engine, lease_of(claim(engine)), reason="worker was stopped")
    job = read(engine, job_id)
    assert (job.status, job.attempt, job.num_lost_attempts) == (JobStatus.queued, 5, 0)


def test_queued_job_is_cancelled_at_once_and_twice_is_harmless(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    assert job_queue.cancel(engine, job_id).status is JobStatus.cancelled
    assert job_queue.cancel(engine, job_id).status is JobStatus.cancelled
    assert claim(engine) is None
    assert events(engine, job_id) == ["queued", "cancelled"]


def test_running_job_is_asked_to_stop(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    assert not job_queue.is_cancel_requested(engine, lease)
    assert job_queue.cancel(engine, lease.job_id).status is JobStatus.running
    assert job_queue.is_cancel_requested(engine, lease)
    job_queue.acknowledge_cancel(engine, lease)
    assert read(engine, lease.job_id).status is JobStatus.cancelled


def test_cancel_of_a_job_whose_worker_is_gone_is_immediate(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    claim(engine)
    expire_lease(engine, job_id)
    assert job_queue.cancel(engine, job_id).status is JobStatus.cancelled


def test_ended_job_cannot_be_cancelled_and_a_live_one_not_deleted(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    with pytest.raises(JobStateError, match="cancel it before"):
        job_queue.remove(engine, job_id)
    job_queue.finish(engine, lease_of(claim(engine)), test_metrics={})
    with pytest.raises(JobStateError, match="succeeded"):
        job_queue.cancel(engine, job_id)
    job_queue.remove(engine, job_id)
    assert events(engine, job_id) == []


def test_full_queue_refuses(engine: Engine) -> None:
    def submit() -> None:
        job_queue.submit(engine, option=Option.a, config=TrainingConfig(), max_queued_jobs=2)

    submit()
    submit()
    with pytest.raises(QueueFullError, match="2 jobs wait"):
        submit()
