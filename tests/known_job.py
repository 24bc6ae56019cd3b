"""The allowed transitions of a job, its worker's writes, and its state in the database."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Row, select
from sqlmodel import SQLModel

from server.files.artifacts import JobFiles
from server.jobs import leases, queue, records
from server.jobs.leases import Lease, StopRequest
from server.models.columns import FiniteJSON, utc_now
from server.models.epochs import EpochMetrics
from server.models.provenance import Provenance
from server.models.tables import (
    Artifact,
    ArtifactKind,
    BestBy,
    EventKind,
    FailureKind,
    Job,
    JobEvent,
    JobPhase,
    JobStatus,
    ResumePoint,
)

MAX_ATTEMPTS = 2
LEASE_SECONDS = 10_000.0
NO_FOLDER = Path("/nowhere")
QUEUED, RUNNING, PAUSED = JobStatus.queued, JobStatus.running, JobStatus.paused
SUCCEEDED, FAILED, CANCELLED = JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled

Transition = tuple[JobStatus | None, JobStatus | None]  # None: there is no such job

LEFT_BY_ITS_WORKER: set[Transition] = {
    (RUNNING, QUEUED),
    (RUNNING, CANCELLED),
    (RUNNING, PAUSED),
}
#: Every allowed change of a status, by the operation that makes it.
TRANSITIONS: dict[str, set[Transition]] = {
    "submit": {(None, QUEUED)},
    "claim": {(QUEUED, RUNNING)},
    "finish": {(RUNNING, SUCCEEDED)},
    "fail": {(RUNNING, FAILED)},
    "lose": {*LEFT_BY_ITS_WORKER, (RUNNING, FAILED)},
    "stop": LEFT_BY_ITS_WORKER,
    "hand_back": LEFT_BY_ITS_WORKER,
    # A running job is left to its worker or, if that is dead, to a reaper.
    "cancel": {(QUEUED, CANCELLED), (PAUSED, CANCELLED)},
    "pause": {(QUEUED, PAUSED)},
    "resume": {(status, QUEUED) for status in (PAUSED, SUCCEEDED, FAILED, CANCELLED)},
    "remove": {(status, None) for status in (SUCCEEDED, FAILED, CANCELLED)},
    "note": set(),
    "refuse": set(),
}
STOP_REQUESTS = {StopRequest.cancel: queue.cancel, StopRequest.pause: queue.pause}
AFTER_REQUEST = {StopRequest.cancel: CANCELLED, StopRequest.pause: PAUSED}

Command = Callable[[Engine, str], object]
COMMANDS: list[Command] = [queue.cancel, queue.pause, queue.resume, queue.remove]

Write = Callable[[Engine, Lease], object]


def record_epoch(
    engine: Engine, lease: Lease, *, epoch: int = 1, best_by: Collection[BestBy] = BestBy
) -> list[Artifact]:
    """Returns what was published."""
    published: list[Artifact] = []

    def publish() -> list[Artifact]:
        published.append(make_checkpoint(lease, epoch))
        return published

    records.record_epoch(
        engine,
        lease,
        make_epoch(lease, epoch),
        publish=publish,
        resume_point=None,
        best_by=best_by,
        progress=epoch / 50,
    )
    return published


def record_resume_point(engine: Engine, lease: Lease) -> None:
    point = ResumePoint(file_name="latest.safetensors", sha256="0" * 64, epoch=1, step=2)
    records.record_resume_point(engine, lease, point, publish=lambda: None)


def add_note(engine: Engine, lease: Lease) -> None:
    records.add_note(engine, lease, EventKind.warning, message="it is late")


def keep_named_files(engine: Engine, lease: Lease) -> None:
    records.keep_named_files(engine, lease, files=JobFiles(NO_FOLDER, lease.job_id))


def fail(
    engine: Engine,
    lease: Lease,
    *,
    kind: FailureKind = FailureKind.infrastructure,
    retry_seconds: float = 0.0,
) -> None:
    queue.fail(
        engine,
        lease,
        code="x",
        message="because",
        kind=kind,
        max_attempts=MAX_ATTEMPTS,
        retry_seconds=retry_seconds,
    )


#: What a worker writes while its job runs on.
NOTES: dict[str, Write] = {
    "heartbeat": partial(leases.heartbeat, lease_seconds=LEASE_SECONDS, progress=0.5),
    "set_phase": partial(records.set_phase, phase=JobPhase.saving),
    "record_start": partial(
        records.record_start,
        device="cpu",
        progress=0.0,
        dataset_summary={},
        provenance=Provenance(),
        warnings=[],
    ),
    "record_resume_point": record_resume_point,
    "add_note": add_note,
    "keep_named_files": keep_named_files,
}
#: Everything that only the holder of the lease may do.
WRITES: dict[str, Write] = NOTES | {
    "read_stop_request": leases.read_stop_request,
    "record_epoch": record_epoch,
    "finish": partial(queue.finish, test_metrics={}),
    "fail": fail,
    "stop": queue.stop,
    "hand_back": partial(queue.hand_back, reason="worker was stopped"),
}


@dataclass
class KnownJob:
    """The expected state of a job."""

    priority: int
    status: JobStatus = QUEUED
    attempt: int = 0
    lease: Lease | None = None
    is_silent: bool = False
    is_delayed: bool = False
    request: StopRequest | None = None
    num_lost: int = 0
    epochs_completed: int = 0
    attempt_of_epoch: dict[int, int] = field(default_factory=dict)

    @property
    def is_due(self) -> bool:
        return self.status is QUEUED and not self.is_delayed

    def can_resume(self, num_epochs: int | None) -> bool:
        if self.status in (QUEUED, RUNNING):
            return self.request is not StopRequest.cancel and num_epochs is None
        if num_epochs is None:
            return self.status is not SUCCEEDED
        return num_epochs > self.epochs_completed

    def resume(self) -> None:
        if self.status in (QUEUED, RUNNING):
            self.request = None
        else:
            self.settle(QUEUED)
            self.num_lost = 0

    def can_be_asked(self, request: StopRequest) -> bool:
        if request is StopRequest.cancel:
            return self.status not in (SUCCEEDED, FAILED)
        return not self.status.is_terminal and self.request is not StopRequest.cancel

    def ask(self, request: StopRequest) -> bool:
        """Whether the request changes anything; a worker is waited for."""
        is_waited_for = self.lease is not None
        is_new = request is not self.request or not is_waited_for
        if not is_new or AFTER_REQUEST[request] is self.status:
            return False
        self.request = request
        if not is_waited_for:
            self.leave()
        return True

    def start(self, job_id: str, *, worker_id: str) -> Lease:
        self.status = RUNNING
        self.attempt += 1
        self.lease = Lease(job_id, self.attempt, worker_id)
        return self.lease

    def settle(self, status: JobStatus) -> None:
        self.status = status
        self.lease = None
        self.request = None
        self.is_silent = self.is_delayed = False

    def leave(self, otherwise: JobStatus = QUEUED) -> None:
        """A worker gives up the job; a request to stop takes precedence."""
        self.settle(AFTER_REQUEST[self.request] if self.request else otherwise)

    def lose(self, *, is_delayed: bool = False) -> None:
        self.num_lost += 1
        self.leave(FAILED if self.num_lost >= MAX_ATTEMPTS else QUEUED)
        self.is_delayed = is_delayed and self.status is QUEUED


@dataclass(frozen=True)
class SeenJob:
    """All rows of a job in the database."""

    row: dict[str, Any]
    events: list[tuple[int, str]]
    epochs: list[Row[Any]]
    artifacts: list[Row[Any]]

    def statuses_told_since(self, before: "SeenJob | None") -> list[str]:
        told = before.events if before is not None else []
        assert self.events[: len(told)] == told, "an event came before older ones, or was lost"
        return [kind for _, kind in self.events[len(told) :] if kind in set(JobStatus)]


def look(engine: Engine) -> dict[str, SeenJob]:
    with engine.connect() as connection:

        def rows(table: type[SQLModel], *order: Any) -> list[Row[Any]]:
            return list(connection.execute(select(table.__table__).order_by(*order)))  # type: ignore[attr-defined]

        seen = {row.id: SeenJob(dict(row._mapping), [], [], []) for row in rows(Job)}
        for event in rows(JobEvent, JobEvent.id):
            seen[event.job_id].events.append((event.id, event.kind))
        for epoch in rows(EpochMetrics, EpochMetrics.epoch):
            seen[epoch.job_id].epochs.append(epoch)
        for artifact in rows(Artifact, Artifact.id):
            seen[artifact.job_id].artifacts.append(artifact)
    return seen


def make_epoch(lease: Lease, epoch: int) -> EpochMetrics:
    columns = EpochMetrics.__table__.columns  # type: ignore[attr-defined]
    measured = {column.name: [] if isinstance(column.type, FiniteJSON) else 0 for column in columns}
    row = {"job_id": lease.job_id, "epoch": epoch, "attempt": lease.attempt}
    return EpochMetrics(**measured | row | {"recorded_at": utc_now()})


def make_checkpoint(lease: Lease, epoch: int) -> Artifact:
    return Artifact(
        job_id=lease.job_id,
        kind=ArtifactKind.checkpoint,
        epoch=epoch,
        file_name=f"epoch_{epoch:04d}.safetensors",
        size_bytes=1,
        sha256="0" * 64,
    )


def assert_allowed(action: str, before: SeenJob | None, after: SeenJob | None) -> None:
    old = before.row["status"] if before is not None else None
    new = after.row["status"] if after is not None else None
    assert old == new or (old, new) in TRANSITIONS[action]
    if after is not None:
        assert after.statuses_told_since(before) == ([new] if old != new else [])
        attempt = before.row["attempt"] if before is not None else 0
        assert after.row["attempt"] == attempt + (action == "claim")
