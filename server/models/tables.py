"""The tables: jobs with their labels, files and events; own options; workers; idempotency keys.

The metrics of jobs are in `server.models.epochs`, studies in `server.models.studies`."""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import BaseModel, StrictFloat, StrictInt
from sqlalchemy import (
    Index,
    UniqueConstraint,
    and_,
    or_,
    text,
)
from sqlmodel import Field as Col
from sqlmodel import SQLModel, col

from server.models.columns import (
    UTCDateTime,
    job_id_column,
    json_type,
    labels_column,
    open_text_column,
    store_finite_numbers,
    text_column,
    utc_now,
)
from server.models.configuration import TrainingConfig, check_config, read_config
from server.models.provenance import Provenance

#: Columns of settings, and of values that may be missing.
_SETTINGS: Final = json_type(dict[str, Any], keeps_unreadable=True)
_VALUES: Final = json_type(dict[str, Any] | None)


class JobStatus(StrEnum):
    """The status of a job. A request to stop is a separate column, not a status."""

    queued = "queued"  #: waits for a worker
    running = "running"  #: a worker holds its lease
    paused = "paused"  #: stopped on request, continues from its last checkpoint when resumed
    succeeded = "succeeded"  #: all planned epochs ran
    failed = "failed"  #: stopped by the error in `error_message`
    cancelled = "cancelled"  #: stopped on request

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES: Final = frozenset({JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled})


class JobPhase(StrEnum):
    """The current activity of a running job's worker."""

    loading_data = "loading_data"
    training = "training"
    evaluating = "evaluating"
    saving = "saving"


class FailureKind(StrEnum):
    """The cause of a failure; only `infrastructure` is retried automatically."""

    user = "user"
    oom = "oom"
    numeric = "numeric"
    infrastructure = "infrastructure"
    timeout = "timeout"


class BestBy(StrEnum):
    """What makes an epoch the best of its job; both are measured on the validation split."""

    loss = "loss"  #: the lowest reconstruction loss, with the job's own class weights
    likelihood = "likelihood"  #: the highest log-likelihood, which is the same for every loss


def is_judged(status: JobStatus, failure_kind: FailureKind | None) -> bool:
    """Whether a job succeeded, or failed because its loss was no number any more."""
    is_numeric = failure_kind == FailureKind.numeric
    return status == JobStatus.succeeded or (status == JobStatus.failed and is_numeric)


def new_id() -> str:
    """Twelve random hex digits: short enough to type, long enough to be unique."""
    return uuid.uuid4().hex[:12]


class _StoredOverlap(BaseModel):
    exact: StrictInt
    by_orbit: StrictInt


class _StoredSummary(BaseModel):
    """What is used of a data set's summary; another version may store more or less."""

    sha256: str = ""
    num_train: StrictInt = 0
    num_val: StrictInt = 0
    num_test: StrictInt = 0
    grid_size: StrictInt = 0
    background_share: StrictFloat = 0.0
    overlap: dict[Literal["val", "test"], _StoredOverlap] = {}
    num_available: dict[str, StrictInt] = {}


class Job(SQLModel, table=True):
    """One requested training run. Only `server.jobs.queue` changes its status; its worker writes
    the other columns through `server.jobs.records`."""

    __tablename__ = "job"
    __table_args__ = (
        Index("ix_job_created_at_id", "created_at", "id"),
        Index("ix_job_status_priority", "status", "priority", "created_at"),
        # Each filter of the job list has an index in the order of the list.
        Index("ix_job_status_created_at", "status", "created_at", "id"),
        Index("ix_job_option_created_at", "option", "created_at", "id"),
        Index("ix_job_option_status_created_at", "option", "status", "created_at", "id"),
        Index("ix_job_name_created_at", "name", "created_at", "id"),
        Index("ix_job_config_sha256_created_at", "config_sha256", "created_at", "id"),
        Index(
            "ix_job_requeued",
            "num_requeues",
            sqlite_where=text("num_requeues > 0"),
            postgresql_where=text("num_requeues > 0"),
        ),
    )

    id: str = Col(default_factory=new_id, primary_key=True, max_length=12)
    name: str | None = None
    option: str = Col(max_length=64)
    quick_test: bool = False
    is_pinned: bool = False  # its checkpoints stay when space is needed
    labels: dict[str, str] = Col(
        default_factory=dict,
        sa_column=labels_column(),
    )
    priority: int = 0
    config: dict[str, Any] = Col(sa_type=_SETTINGS)
    config_sha256: str = Col(default="", max_length=64)  # see `compute_config_sha256`
    study_id: str | None = Col(default=None, max_length=12, index=True)  # the study that made it
    queued_by: str = ""  # the token of the request that queued it last; empty without one
    client: str = ""  # the program that posted it or its study, in its own words

    status: JobStatus = Col(default=JobStatus.queued, sa_column=text_column("status", JobStatus))
    phase: JobPhase | None = Col(
        default=None, sa_column=text_column("phase", JobPhase, nullable=True)
    )
    progress: float = 0.0  # share of all planned steps, 0 to 1
    progress_at: datetime | None = Col(default=None, sa_type=UTCDateTime)  # when it last rose
    attempt: int = 0  # raised by every claim
    num_requeues: int = 0  # how often a worker lost the job or handed it back
    num_lost_attempts: int = 0  # since the last resume; through no fault of the job
    available_at: datetime | None = Col(default=None, sa_type=UTCDateTime)  # not claimed before
    worker_id: str | None = None
    lease_expires_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    claimed_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    claimed_progress: float = 0.0  # where the attempt began
    resume_point: dict[str, Any] | None = Col(default=None, sa_type=_VALUES)  # a ResumePoint
    cancel_requested_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    pause_requested_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    created_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)
    started_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    ended_at: datetime | None = Col(default=None, sa_type=UTCDateTime)
    error_code: str | None = None
    error_message: str | None = None
    failure_kind: FailureKind | None = Col(
        default=None, sa_column=text_column("failure_kind", FailureKind, nullable=True)
    )

    # Summary columns, so that a list of jobs does not read per-epoch rows.
    epochs_completed: int = 0
    best_epoch: int | None = None  # by loss
    best_val_recon_loss: float | None = None
    best_likelihood_epoch: int | None = None
    best_val_log_likelihood: float | None = None
    train_loss: float | None = None
    train_pixel_accuracy: float | None = None
    val_foreground_recall: float | None = None
    val_foreground_iou: float | None = None
    device: str | None = None
    provenance: dict[str, Any] | None = Col(default=None, sa_type=json_type(Provenance | None))
    dataset_summary: dict[str, Any] | None = Col(
        default=None, sa_type=json_type(_StoredSummary | None)
    )
    test_metrics: dict[str, Any] | None = Col(default=None, sa_type=_VALUES)  # of `best_epoch`
    # Of `best_likelihood_epoch`.
    likelihood_test_metrics: dict[str, Any] | None = Col(default=None, sa_type=_VALUES)

    @property
    def is_judged(self) -> bool:
        """Whether the job says something about its loss: other failures are those of machines."""
        return is_judged(self.status, self.failure_kind)

    @property
    def best_epochs(self) -> dict[BestBy, int | None]:
        return {BestBy.loss: self.best_epoch, BestBy.likelihood: self.best_likelihood_epoch}

    @property
    def training_config(self) -> TrainingConfig:
        """As it is shown and judged, also if another version stored it."""
        return read_config(self.config)

    @property
    def trainable_config(self) -> TrainingConfig:
        """As it is trained with. Raises StoredConfigError."""
        return check_config(self.config)


#: What `Job.is_judged` says, as a condition of a query.
IS_JUDGED: Final = or_(
    col(Job.status) == JobStatus.succeeded,
    and_(col(Job.status) == JobStatus.failed, col(Job.failure_kind) == FailureKind.numeric),
)


class JobLabel(SQLModel, table=True):
    """One label of a job, to filter by; stored with the job and never changed.

    It repeats the job's `created_at`, so that an index has the jobs of a label in order.
    """

    __tablename__ = "job_label"
    __table_args__ = (Index("ix_job_label_created_at", "key", "value", "created_at", "job_id"),)

    job_id: str = Col(sa_column=job_id_column(primary_key=True))
    key: str = Col(primary_key=True)
    value: str
    created_at: datetime = Col(sa_type=UTCDateTime)


class EventKind(StrEnum):
    """The kind of a JobEvent; one named like a status means that the job now has it."""

    queued = "queued"
    running = "running"
    paused = "paused"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"
    cancel_requested = "cancel_requested"
    pause_requested = "pause_requested"
    resumed = "resumed"  #: an attempt goes on from a checkpoint
    epoch = "epoch"
    checkpoint = "checkpoint"
    reconstruction = "reconstruction"
    warning = "warning"


class JobEvent(SQLModel, table=True):
    """One event of a job: a transition, epoch, file or warning.

    Events are written while the job's row is locked, so their ids rise in the order of commit.
    """

    __tablename__ = "job_event"
    __table_args__ = (Index("ix_job_event_job_id_id", "job_id", "id"),)

    id: int | None = Col(default=None, primary_key=True)
    job_id: str = Col(sa_column=job_id_column())
    kind: str  # an EventKind
    message: str
    data: dict[str, Any] | None = Col(default=None, sa_type=_VALUES)  # the values, for programs
    created_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)


class ArtifactKind(StrEnum):
    checkpoint = "checkpoint"
    reconstruction = "reconstruction"


class ResumePoint(BaseModel):
    """The file from which a job that stopped between two checkpoints goes on."""

    file_name: str
    sha256: str
    epoch: int  # epochs completed
    step: int  # steps done in the epoch after it


class Artifact(SQLModel, table=True):
    """A file of a job. Its row is committed after the file is written, so the file exists."""

    __tablename__ = "artifact"
    __table_args__ = (UniqueConstraint("job_id", "kind", "epoch"),)

    id: int | None = Col(default=None, primary_key=True)
    job_id: str = Col(sa_column=job_id_column())
    kind: ArtifactKind = Col(sa_column=open_text_column(ArtifactKind, length=20))
    epoch: int
    file_name: str
    size_bytes: int
    sha256: str
    samples: list[dict[str, float | None]] | None = Col(
        default=None, sa_type=json_type(list[dict[str, StrictFloat | None]] | None)
    )
    created_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)


class OwnOption(SQLModel, table=True):
    """An option that a user added. It never changes: jobs and studies refer to it by its name."""

    __tablename__ = "own_option"

    name: str = Col(primary_key=True, max_length=64)
    base: str = Col(max_length=64)  # the option that it was derived from
    #: The settings in which it differs from its base.
    config: dict[str, Any] = Col(sa_type=_SETTINGS)
    preset: dict[str, Any] = Col(sa_type=_SETTINGS)  # those of its base and its own together
    summary: str = ""
    created_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)


class IdempotencyKey(SQLModel, table=True):
    """A request that must not be executed twice, with its first answer.

    The row is committed in the same transaction as the request's effect.
    """

    __tablename__ = "idempotency_key"
    # What is kept of a token is counted without reading the answers.
    __table_args__ = (
        Index("ix_idempotency_key_token", "token_name", "created_at", "key", "num_bytes"),
    )

    token_name: str = Col(primary_key=True)
    key: str = Col(primary_key=True, max_length=255)
    body_sha256: str
    answer: str  # JSON
    num_bytes: int = 0  # of the answer
    location: str
    created_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime, index=True)


class WorkerState(StrEnum):
    """The state of a worker by its heartbeats."""

    idle = "idle"
    busy = "busy"
    stalled = "stalled"  #: sends heartbeats, but its job makes no progress
    stale = "stale"  #: several heartbeats are missing
    dead = "dead"  #: no heartbeat for longer than a lease
    stopped = "stopped"  #: ended normally


class Worker(SQLModel, table=True):
    """A process, or one slot of it, that claims jobs, and its last heartbeat."""

    __tablename__ = "worker"

    id: str = Col(primary_key=True)
    host: str
    pid: int
    device: str
    version: str = ""  # of Losslab
    torch_version: str = ""
    state: WorkerState = Col(sa_column=open_text_column(WorkerState))  # reported
    job_id: str | None = None
    started_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)
    heartbeat_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)


store_finite_numbers(Job, JobLabel, JobEvent, Artifact, OwnOption, IdempotencyKey, Worker)
