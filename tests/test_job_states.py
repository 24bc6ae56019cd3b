"""Random sequences of job operations, on both databases, compared with a model."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import pytest
from conftest import BOTH_DATABASES, queue_job
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from known_job import (
    COMMANDS,
    FAILED,
    LEASE_SECONDS,
    MAX_ATTEMPTS,
    NOTES,
    QUEUED,
    RUNNING,
    STOP_REQUESTS,
    SUCCEEDED,
    WRITES,
    Command,
    KnownJob,
    assert_allowed,
    fail,
    look,
    record_epoch,
)
from sqlalchemy import Engine, delete, update
from sqlmodel import Session

from server.database.engine import write_transaction
from server.jobs import leases, queue
from server.jobs.leases import Lease, LeaseLostError, SeenLease, StopRequest
from server.jobs.listing import JobNotFoundError
from server.jobs.queue import JobStateError
from server.models.columns import utc_now
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption
from server.models.tables import BestBy, FailureKind, Job

pytestmark = [BOTH_DATABASES, pytest.mark.slow]

MAX_JOBS = 3
MAX_EXAMPLES = {"sqlite": 150, "postgresql": 75}

T = TypeVar("T")


OWN_FAULTS = [kind for kind in FailureKind if kind is not FailureKind.infrastructure]
NEVER_GIVEN = Lease("0" * 12, attempt=1, worker_id="w1")

workers = st.sampled_from(["w1", "w2"])
epochs = st.integers(1, 4)
stop_requests = st.sampled_from(StopRequest)
late_requests = st.none() | stop_requests
priorities = st.integers(-1, 1)


def of_machine(read: Callable[["JobQueueMachine"], Iterable[T]]) -> st.SearchStrategy[T]:
    """A random element of what the machine has at the time."""
    return st.runner().flatmap(lambda machine: st.sampled_from(list(read(machine))))


jobs = of_machine(lambda machine: machine.known)
busy_jobs = of_machine(lambda machine: machine.busy_jobs or machine.known)
held_leases = of_machine(lambda machine: machine.held_leases)
stale_leases = of_machine(lambda machine: machine.stale_leases)


class JobQueueMachine(RuleBasedStateMachine):
    """Runs all operations on jobs in random order, one at a time."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.known: dict[str, KnownJob] = {}
        self.given = [NEVER_GIVEN]
        self.silent: list[SeenLease] = []
        with engine.begin() as connection:
            connection.execute(delete(Job))
        self.seen = look(engine)

    # -- operations of clients

    @initialize(priorities=st.lists(priorities, min_size=1, max_size=MAX_JOBS))
    def begin_with_a_running_job(self, priorities: list[int]) -> None:
        for priority in priorities:
            self.submit(priority)
        self.claim("w1", job_id=None)

    @precondition(lambda self: len(self.known) < MAX_JOBS)
    @rule(priority=priorities)
    def submit(self, priority: int) -> None:
        job = queue_job(
            self.engine, option=BuiltInOption.a, config=TrainingConfig(), priority=priority
        )
        assert job.id not in self.known
        self.known[job.id] = KnownJob(priority)
        self.check("submit", job.id)

    @precondition(lambda self: self.known)
    @rule(job_id=jobs | busy_jobs, request=stop_requests)
    def request_stop(self, job_id: str, request: StopRequest) -> None:
        known = self.known[job_id]
        if not known.can_be_asked(request):
            self.refuse(STOP_REQUESTS[request], job_id)
            return
        STOP_REQUESTS[request](self.engine, job_id)
        is_new = known.ask(request)
        self.check(request, *[job_id] if is_new else [])

    @precondition(lambda self: any(known.status is not QUEUED for known in self.known.values()))
    @rule(job_id=jobs, num_epochs=st.none() | epochs)
    def resume(self, job_id: str, num_epochs: int | None) -> None:
        known = self.known[job_id]
        if not known.can_resume(num_epochs):
            self.refuse(partial(queue.resume, num_epochs=num_epochs), job_id)
            return
        queue.resume(self.engine, job_id, num_epochs=num_epochs)
        known.resume()
        self.check("resume", job_id)

    @precondition(lambda self: self.known)
    @rule(job_id=jobs)
    def remove(self, job_id: str) -> None:
        if not self.known[job_id].status.is_terminal:
            self.refuse(queue.remove, job_id)
            return
        queue.remove(self.engine, job_id)
        del self.known[job_id]
        self.check("remove", job_id)
        for command in COMMANDS:
            self.refuse(command, job_id)

    # -- operations of workers

    @precondition(lambda self: self.known)
    @rule(worker_id=workers, job_id=st.none() | jobs)
    def claim(self, worker_id: str, job_id: str | None) -> None:
        first = self.first_in_line(job_id)
        job = queue.claim(
            self.engine, worker_id=worker_id, lease_seconds=LEASE_SECONDS, job_id=job_id
        )
        assert (job and job.id) == first
        if first is not None:
            self.given.append(self.known[first].start(first, worker_id=worker_id))
        self.check("claim", first)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, name=st.sampled_from(sorted(NOTES)))
    def note(self, lease: Lease, name: str) -> None:
        NOTES[name](self.engine, lease)
        self.known[lease.job_id].is_silent &= name != "heartbeat"
        self.check("note", lease.job_id)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, epoch=epochs, best_by=st.sets(st.sampled_from(BestBy)))
    def record_epoch(self, lease: Lease, epoch: int, best_by: set[BestBy]) -> None:
        known = self.known[lease.job_id]
        is_new = known.attempt_of_epoch.get(epoch) != lease.attempt
        published = record_epoch(self.engine, lease, epoch=epoch, best_by=best_by)
        assert bool(published) == is_new
        if is_new:
            known.attempt_of_epoch[epoch] = lease.attempt
            known.epochs_completed = epoch
        self.check("note", lease.job_id)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases)
    def finish(self, lease: Lease) -> None:
        queue.finish(self.engine, lease, test_metrics={"loss": 1.0})
        self.known[lease.job_id].settle(SUCCEEDED)
        self.check("finish", lease.job_id)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, request=late_requests)
    def stop(self, lease: Lease, request: StopRequest | None) -> None:
        if self.is_left_after(request, lease):
            queue.stop(self.engine, lease)
            self.known[lease.job_id].leave()
            self.check("stop", lease.job_id)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, request=late_requests)
    def hand_back(self, lease: Lease, request: StopRequest | None) -> None:
        if self.is_left_after(request, lease):
            queue.hand_back(self.engine, lease, reason="worker was stopped")
            self.known[lease.job_id].leave()
            self.check("hand_back", lease.job_id)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, kind=st.sampled_from(OWN_FAULTS))
    def fail(self, lease: Lease, kind: FailureKind) -> None:
        fail(self.engine, lease, kind=kind)
        self.known[lease.job_id].settle(FAILED)
        self.check("fail", lease.job_id)

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, request=late_requests, is_delayed=st.booleans())
    def lose(self, lease: Lease, request: StopRequest | None, is_delayed: bool) -> None:
        if self.is_left_after(request, lease):
            fail(self.engine, lease, retry_seconds=LEASE_SECONDS if is_delayed else 0.0)
            self.known[lease.job_id].lose(is_delayed=is_delayed)
            self.check("lose", lease.job_id)

    @rule(lease=stale_leases, name=st.sampled_from(sorted(WRITES)))
    def write_with_a_stale_lease(self, lease: Lease, name: str) -> None:
        with pytest.raises(LeaseLostError):
            WRITES[name](self.engine, lease)
        self.check("refuse")

    # -- effects of time

    @precondition(lambda self: self.held_leases)
    @rule(lease=held_leases, is_noticed=st.booleans())
    def fall_silent(self, lease: Lease, is_noticed: bool) -> None:
        with Session(self.engine) as session:
            self.silent += [s for s in leases.read_leases(session) if s.job_id == lease.job_id]
        self.known[lease.job_id].is_silent = True
        if is_noticed:
            self.requeue_lost_jobs()

    @precondition(lambda self: any(known.is_delayed for known in self.known.values()))
    @rule()
    def come_due(self) -> None:
        for job_id, known in self.known.items():
            if known.is_delayed:
                self.change(job_id, available_at=utc_now())
                known.is_delayed = False

    # -- invariants

    @invariant()
    def jobs_are_what_they_should_be(self) -> None:
        for job_id, known in self.known.items():
            row = self.seen[job_id].row
            assert row["status"] == known.status
            assert row["attempt"] == known.attempt
            assert row["epochs_completed"] == known.epochs_completed
            epochs = {epoch.epoch: epoch.attempt for epoch in self.seen[job_id].epochs}
            assert epochs == known.attempt_of_epoch

    @invariant()
    def running_jobs_and_no_others_have_a_lease(self) -> None:
        for job_id, known in self.known.items():
            row = self.seen[job_id].row
            assert (row["lease_expires_at"] is not None) == (row["status"] is RUNNING)
            if row["status"] is RUNNING:
                assert Lease(job_id, row["attempt"], row["worker_id"]) == known.lease

    @invariant()
    def workers_hear_what_was_requested(self) -> None:
        for lease in self.held_leases:
            heard = leases.read_stop_request(self.engine, lease)
            assert heard == self.known[lease.job_id].request

    @invariant()
    def lost_attempts_are_bounded(self) -> None:
        for job_id, known in self.known.items():
            row = self.seen[job_id].row
            assert row["num_lost_attempts"] == known.num_lost <= MAX_ATTEMPTS
            assert known.num_lost < MAX_ATTEMPTS or row["status"] not in (QUEUED, RUNNING)

    # -- helpers

    @property
    def held_leases(self) -> list[Lease]:
        return [known.lease for known in self.known.values() if known.lease is not None]

    @property
    def busy_jobs(self) -> list[str]:
        return [lease.job_id for lease in self.held_leases]

    @property
    def stale_leases(self) -> list[Lease]:
        return [lease for lease in self.given if lease not in self.held_leases]

    def first_in_line(self, job_id: str | None) -> str | None:
        """Of the jobs with the highest priority an interrupted one, then the oldest; `known` is in
        the order of submission."""
        wanted = self.known if job_id is None else {job_id} & self.known.keys()
        due = [wanted_id for wanted_id in wanted if self.known[wanted_id].is_due]
        return max(
            due,
            key=lambda due_id: (self.known[due_id].priority, self.known[due_id].attempt > 0),
            default=None,
        )

    def refuse(self, command: Command, job_id: str) -> None:
        with pytest.raises(JobStateError if job_id in self.known else JobNotFoundError):
            command(self.engine, job_id)
        self.check("refuse")

    def is_left_after(self, request: StopRequest | None, lease: Lease) -> bool:
        """Request a stop at the last moment; returns whether the worker still has the job."""
        if request is not None:
            self.request_stop(lease.job_id, request)
        return lease in self.held_leases

    def requeue_lost_jobs(self) -> None:
        """A reaper has also seen leases that were renewed since, or whose attempt is over."""
        lost = [job_id for job_id, known in self.known.items() if known.is_silent]
        with write_transaction(self.engine) as session:
            num_lost = queue.requeue_lost_jobs(
                session, self.silent, max_attempts=MAX_ATTEMPTS, lease_seconds=LEASE_SECONDS
            )
        assert num_lost == len(lost)
        for job_id in lost:
            self.known[job_id].lose()
        self.check("lose", *lost)

    def change(self, job_id: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(Job).where(Job.id == job_id).values(**values))
        self.seen = look(self.engine)

    def check(self, action: str, *job_ids: str | None) -> None:
        """These jobs may have changed as the action may change them, and no others."""
        now = look(self.engine)
        assert now.keys() == self.known.keys(), "a job was lost"
        for job_id in now.keys() | self.seen.keys():
            before, after = self.seen.get(job_id), now.get(job_id)
            if job_id in job_ids:
                assert_allowed(action, before, after)
            else:
                assert before == after
        self.seen = now


def test_no_history_breaks_the_rules(database: str, engine: Engine) -> None:
    run_state_machine_as_test(
        partial(JobQueueMachine, engine),
        settings=run_settings(
            derandomize=True,
            deadline=None,
            max_examples=MAX_EXAMPLES[database],
        ),
    )
