"""Every transition of a job, on both databases."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from conftest import BOTH_DATABASES, SubmitJob, queue_job
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.database.engine import write_transaction
from server.jobs import leases, queue, records
from server.jobs.admission import QueueFullError
from server.jobs.leases import Lease, LeaseLostError, SeenLease, StopRequest
from server.jobs.queue import JobStateError
from server.models.columns import utc_now
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption
from server.models.tables import EventKind, FailureKind, Job, JobEvent, JobStatus

pytestmark = BOTH_DATABASES


def claim(engine: Engine, worker_id: str = "w1") -> Job | None:
    return queue.claim(engine, worker_id=worker_id, lease_seconds=30)


def lease_of(job: Job | None) -> Lease:
    assert job is not None
    assert job.worker_id is not None
    return Lease(job.id, job.attempt, job.worker_id)


def read(engine: Engine, job_id: str) -> Job:
    with Session(engine) as session:
        return session.exec(select(Job).where(Job.id == job_id)).one()


def events(engine: Engine, job_id: str) -> list[str]:
    with Session(engine) as session:
        kinds = select(JobEvent.kind).where(JobEvent.job_id == job_id)
        return list(session.exec(kinds.order_by(col(JobEvent.id))))


def fail(engine: Engine, lease: Lease, kind: FailureKind, *, retry_seconds: float = 0) -> None:
    queue.fail(
        engine,
        lease,
        code="x",
        message="because",
        kind=kind,
        max_attempts=3,
        retry_seconds=retry_seconds,
    )


def read_lease(engine: Engine, job_id: str) -> SeenLease:
    with Session(engine) as session:
        return next(lease for lease in leases.read_leases(session) if lease.job_id == job_id)


def requeue_lost(engine: Engine, *silent: SeenLease) -> int:
    with write_transaction(engine) as session:
        return queue.requeue_lost_jobs(session, silent, max_attempts=3, lease_seconds=30)


def test_submitted_job_is_queued_and_on_disk(engine: Engine, submit_job: SubmitJob) -> None:
    job = submit_job("b")
    stored = read(engine, job.id)
    assert stored.status is JobStatus.queued
    assert stored.option == BuiltInOption.b
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
    taken = queue.claim(engine, worker_id="w1", lease_seconds=30, job_id=second.id)
    assert taken is not None
    assert taken.id == second.id
    assert read(engine, first.id).status is JobStatus.queued


def test_reserved_job_is_for_the_worker_that_asks_for_it(engine: Engine) -> None:
    job = queue_job(engine, option=BuiltInOption.a, config=TrainingConfig(), reserved_seconds=60)
    assert claim(engine) is None
    taken = queue.claim(engine, worker_id="own", lease_seconds=30, job_id=job.id)
    assert taken is not None
    # A delay before the next attempt is not a reservation.
    lease = Lease(taken.id, taken.attempt, "own")
    queue.fail(
        engine, lease, code="x", message="x", kind=FailureKind.infrastructure,
        max_attempts=3, retry_seconds=60,
    )  # fmt: skip
    assert queue.claim(engine, worker_id="own", lease_seconds=30, job_id=job.id) is None


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
    leases.heartbeat(engine, lease_of(job), lease_seconds=600, progress=0.5)
    stored = read(engine, job.id)
    assert stored.progress == 0.5
    assert stored.lease_expires_at is not None
    assert stored.lease_expires_at > utc_now() + timedelta(seconds=500)


def test_finished_job_has_succeeded(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    queue.finish(engine, lease, test_metrics={"loss": 1.0})
    job = read(engine, lease.job_id)
    assert (job.status, job.progress, job.test_metrics) == (JobStatus.succeeded, 1.0, {"loss": 1.0})
    assert job.ended_at is not None
    assert events(engine, job.id) == ["queued", "running", "succeeded"]


def test_failed_job_says_why(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    fail(engine, lease, FailureKind.user)
    job = read(engine, lease.job_id)
    assert (job.status, job.error_message) == (JobStatus.failed, "because")
    assert job.failure_kind is FailureKind.user


def test_lost_job_goes_to_another_worker_and_fences_the_first(
    engine: Engine, submit_job: SubmitJob
) -> None:
    submit_job()
    zombie = lease_of(claim(engine, "zombie"))
    silent = read_lease(engine, zombie.job_id)
    assert requeue_lost(engine, silent) == 1
    assert requeue_lost(engine, silent) == 0
    heir = claim(engine, "heir")
    assert heir is not None
    assert heir.attempt == 2
    for write in (
        lambda: leases.heartbeat(engine, zombie, lease_seconds=30, progress=1.0),
        lambda: leases.read_stop_request(engine, zombie),
        lambda: queue.finish(engine, zombie, test_metrics={}),
        lambda: fail(engine, zombie, FailureKind.user),
        lambda: queue.hand_back(engine, zombie, reason=""),
        lambda: queue.stop(engine, zombie),
        lambda: records.add_note(engine, zombie, EventKind.warning, message=""),
    ):
        with pytest.raises(LeaseLostError):
            write()
    assert read(engine, heir.id).worker_id == "heir"


def test_job_whose_worker_beat_at_the_last_moment_is_not_requeued(
    engine: Engine, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    silent = read_lease(engine, lease.job_id)
    leases.heartbeat(engine, lease, lease_seconds=30, progress=0.0)
    assert requeue_lost(engine, silent) == 0
    assert leases.read_stop_request(engine, lease) is None


def test_job_that_loses_every_worker_fails_in_the_end(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    for _ in range(3):
        claim(engine)
        requeue_lost(engine, read_lease(engine, job_id))
    job = read(engine, job_id)
    assert job.status is JobStatus.failed
    assert job.failure_kind is FailureKind.infrastructure


def test_handing_back_is_no_lost_attempt(engine: Engine, submit_job: SubmitJob) -> None:
    job_id = submit_job().id
    for _ in range(5):
        queue.hand_back(engine, lease_of(claim(engine)), reason="worker was stopped")
    job = read(engine, job_id)
    assert (job.status, job.attempt, job.num_lost_attempts) == (JobStatus.queued, 5, 0)


def test_queued_job_is_cancelled_at_once_and_twice_is_harmless(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    assert queue.cancel(engine, job_id).status is JobStatus.cancelled
    assert queue.cancel(engine, job_id).status is JobStatus.cancelled
    assert claim(engine) is None
    assert events(engine, job_id) == ["queued", "cancelled"]


def test_running_job_is_asked_to_stop(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    assert leases.read_stop_request(engine, lease) is None
    assert queue.cancel(engine, lease.job_id).status is JobStatus.running
    assert leases.read_stop_request(engine, lease) is StopRequest.cancel
    queue.stop(engine, lease)
    assert read(engine, lease.job_id).status is JobStatus.cancelled


def test_cancel_takes_no_job_from_a_worker_whose_lease_is_over_by_the_clock(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    lease = lease_of(claim(engine))
    set_clock_ahead(engine, hours=1)
    assert queue.cancel(engine, job_id).status is JobStatus.running
    assert leases.read_stop_request(engine, lease) is StopRequest.cancel


@pytest.mark.parametrize("hours", [2, -2, -0.1])
def test_retry_does_not_wait_for_hours_when_the_clock_is_set_back(
    engine: Engine, submit_job: SubmitJob, hours: float
) -> None:
    job_id = submit_job().id
    fail(engine, lease_of(claim(engine)), FailureKind.infrastructure, retry_seconds=10)
    assert claim(engine) is None
    set_clock_ahead(engine, hours=hours)
    retried = claim(engine)
    assert retried is not None
    assert retried.id == job_id


def set_clock_ahead(engine: Engine, *, hours: float) -> None:
    """What a clock that is set ahead makes of the stored times: they are so much older."""
    names = ("created_at", "progress_at", "available_at", "lease_expires_at", "claimed_at")
    with write_transaction(engine) as session:
        for job in session.exec(select(Job)):
            for name in names:
                if (moment := getattr(job, name)) is not None:
                    setattr(job, name, moment - timedelta(hours=hours))


def test_interrupted_job_is_claimed_before_new_ones_of_its_priority(
    engine: Engine, submit_job: SubmitJob
) -> None:
    first, interrupted, urgent = submit_job(), submit_job(), submit_job(priority=1)
    lease = lease_of(queue.claim(engine, worker_id="w1", lease_seconds=30, job_id=interrupted.id))
    queue.hand_back(engine, lease, reason="worker was stopped")
    claimed = [claim(engine) for _ in range(3)]
    assert [job and job.id for job in claimed] == [urgent.id, interrupted.id, first.id]


def test_ended_job_cannot_be_cancelled_and_a_live_one_not_deleted(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    with pytest.raises(JobStateError, match="cancel it before"):
        queue.remove(engine, job_id)
    queue.finish(engine, lease_of(claim(engine)), test_metrics={})
    with pytest.raises(JobStateError, match="succeeded"):
        queue.cancel(engine, job_id)
    queue.remove(engine, job_id)
    assert events(engine, job_id) == []


def test_full_queue_refuses(engine: Engine) -> None:
    def submit() -> None:
        queue_job(engine, option=BuiltInOption.a, config=TrainingConfig(), max_queued_jobs=2)

    submit()
    submit()
    with pytest.raises(QueueFullError, match="2 jobs wait"):
        submit()


def test_failure_of_the_infrastructure_is_tried_again_after_a_pause_that_doubles(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    for pause in (10, 20):
        fail(engine, lease_of(claim(engine)), FailureKind.infrastructure, retry_seconds=10)
        job = read(engine, job_id)
        assert job.status is JobStatus.queued
        assert job.available_at is not None
        left = job.available_at - utc_now()
        assert timedelta(seconds=pause - 5) < left <= timedelta(seconds=pause)
        assert claim(engine) is None
        with write_transaction(engine) as session:
            session.get_one(Job, job_id).available_at = utc_now()
    fail(engine, lease_of(claim(engine)), FailureKind.infrastructure)
    job = read(engine, job_id)
    assert (job.status, job.error_code) == (JobStatus.failed, "x")


@pytest.mark.parametrize("kind", [FailureKind.user, FailureKind.oom, FailureKind.numeric])
def test_other_failures_are_not_tried_again(
    engine: Engine, submit_job: SubmitJob, kind: FailureKind
) -> None:
    job_id = submit_job().id
    fail(engine, lease_of(claim(engine)), kind)
    assert read(engine, job_id).status is JobStatus.failed


def test_event_of_a_lost_job_names_the_worker_and_the_time(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    claim(engine, "host-3/1234")
    requeue_lost(engine, read_lease(engine, job_id))
    with Session(engine) as session:
        messages = session.exec(select(JobEvent.message).where(JobEvent.job_id == job_id)).all()
    assert "requeued: worker host-3/1234 sent no heartbeat for 30 s" in messages


def test_queued_job_is_paused_at_once_and_goes_on_when_resumed(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job_id = submit_job().id
    assert queue.pause(engine, job_id).status is JobStatus.paused
    assert queue.pause(engine, job_id).status is JobStatus.paused
    assert claim(engine) is None
    assert queue.resume(engine, job_id).status is JobStatus.queued
    assert queue.resume(engine, job_id).status is JobStatus.queued
    assert lease_of(claim(engine)).job_id == job_id


def test_running_job_pauses_when_its_worker_reads_the_request(
    engine: Engine, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    assert queue.pause(engine, lease.job_id).status is JobStatus.running
    assert leases.read_stop_request(engine, lease) is StopRequest.pause
    queue.stop(engine, lease)
    job = read(engine, lease.job_id)
    assert (job.status, job.ended_at) == (JobStatus.paused, None)


def test_pause_that_is_withdrawn_in_time_changes_nothing(
    engine: Engine, submit_job: SubmitJob
) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    queue.pause(engine, lease.job_id)
    assert queue.resume(engine, lease.job_id).status is JobStatus.running
    assert leases.read_stop_request(engine, lease) is None
    queue.stop(engine, lease)  # the worker had heard of it before
    assert read(engine, lease.job_id).status is JobStatus.queued


def test_cancel_overrides_a_pause(engine: Engine, submit_job: SubmitJob) -> None:
    submit_job()
    lease = lease_of(claim(engine))
    queue.pause(engine, lease.job_id)
    queue.cancel(engine, lease.job_id)
    with pytest.raises(JobStateError, match="is being cancelled"):
        queue.pause(engine, lease.job_id)
    with pytest.raises(JobStateError, match="wait until it has stopped"):
        queue.resume(engine, lease.job_id)
    assert leases.read_stop_request(engine, lease) is StopRequest.cancel


@pytest.mark.parametrize("request_stop", [queue.cancel, queue.pause])
def test_request_to_stop_outlives_the_worker_and_a_hand_back(
    engine: Engine, submit_job: SubmitJob, request_stop: Callable[[Engine, str], Job]
) -> None:
    expected = {queue.cancel: JobStatus.cancelled, queue.pause: JobStatus.paused}
    lost, handed_back = submit_job(), submit_job()
    held = {lease.job_id: lease for lease in (lease_of(claim(engine)), lease_of(claim(engine)))}
    for job in (lost, handed_back):
        request_stop(engine, job.id)
    requeue_lost(engine, read_lease(engine, lost.id))
    queue.hand_back(engine, held[handed_back.id], reason="worker was stopped")
    for job in (lost, handed_back):
        assert read(engine, job.id).status is expected[request_stop]


def test_failed_and_cancelled_jobs_can_be_resumed_with_a_clean_slate(
    engine: Engine, submit_job: SubmitJob
) -> None:
    failed, cancelled = submit_job(), submit_job()
    fail(engine, lease_of(claim(engine)), FailureKind.numeric)
    queue.cancel(engine, cancelled.id)
    for job_id in (failed.id, cancelled.id):
        job = queue.resume(engine, job_id)
        assert job.status is JobStatus.queued
        assert (job.error_code, job.error_message, job.failure_kind) == (None, None, None)
        assert (job.cancel_requested_at, job.ended_at, job.num_lost_attempts) == (None, None, 0)


def test_succeeded_job_goes_on_for_more_epochs_only(engine: Engine, submit_job: SubmitJob) -> None:
    job_id = submit_job(epochs=2).id
    with write_transaction(engine) as session:
        session.get_one(Job, job_id).epochs_completed = 2
    queue.finish(engine, lease_of(claim(engine)), test_metrics={})
    for num_epochs in (None, 1, 2):
        with pytest.raises(JobStateError, match="has completed 2 epochs"):
            queue.resume(engine, job_id, num_epochs=num_epochs)
    job = queue.resume(engine, job_id, num_epochs=8)
    assert (job.status, job.progress, job.config["epochs"]) == (JobStatus.queued, 0.25, 8)
