"""What the API answers, as JSON."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from server.api.addresses import locate
from server.jobs.options import Option
from server.jobs.workers import WorkerReport
from server.judging.comparisons import Comparison, ComparisonRecommendation
from server.judging.criteria import CriteriaSet
from server.judging.decisions import Recommendation
from server.judging.studies import ArmVerdict
from server.judging.verdicts import Verdict
from server.models.columns import count_seconds, utc_now
from server.models.configuration import (
    StoredConfigError,
    TrainingConfig,
    fill_in,
    read_config,
    resolve_config,
)
from server.models.epochs import EpochMetrics
from server.models.provenance import Provenance
from server.models.tables import (
    Artifact,
    FailureKind,
    Job,
    JobEvent,
    JobPhase,
    JobStatus,
    WorkerState,
)


class JobError(BaseModel):
    code: str
    message: str


class JobPublic(BaseModel):
    """A job, with its whole resolved configuration."""

    id: str
    name: str | None
    option: str
    quick_test: bool
    is_pinned: bool
    metadata: dict[str, str]
    priority: int
    config: dict[str, Any] = Field(
        description="a TrainingConfig; of a job that another version stored, as it was stored"
    )
    config_sha256: str = Field(
        description="jobs with the same value differ only in their seeds and checkpoints"
    )
    study_id: str | None = Field(description="the study that queued the job")
    status: JobStatus
    phase: JobPhase | None
    progress: float = Field(description="share of all planned steps, 0 to 1")
    attempt: int
    num_requeues: int = Field(description="how often a worker lost the job or handed it back")
    worker_id: str | None
    cancel_requested_at: datetime | None
    pause_requested_at: datetime | None
    available_at: datetime | None = Field(
        description="no worker claims the job earlier, except one for which it is reserved"
    )
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    seconds_left: float | None = Field(description="estimate for a running job")
    error: JobError | None
    failure_kind: FailureKind | None
    num_epochs: int
    epochs_completed: int
    best_epoch: int | None = Field(description="with the lowest `val_recon_loss`")
    best_val_recon_loss: float | None
    best_likelihood_epoch: int | None = Field(
        description="with the highest `val_log_likelihood`, which no class weight changes"
    )
    best_val_log_likelihood: float | None
    train_loss: float | None
    train_pixel_accuracy: float | None
    val_foreground_recall: float | None
    val_foreground_iou: float | None
    device: str | None
    provenance: Provenance | None = Field(
        description="what made the numbers of the newest attempt; null before it trains, and of "
        "older versions"
    )
    client: str = Field(description="the program that posted the job or its study, by its own name")
    dataset_summary: dict[str, Any] | None
    test_metrics: dict[str, Any] | None = Field(
        description="test split, with the weights of the best epoch"
    )
    likelihood_test_metrics: dict[str, Any] | None = Field(
        description="test split, with the weights of the best epoch by likelihood"
    )

    @classmethod
    def of(cls, job: Job) -> Self:
        config = job.training_config
        error = JobError(code=job.error_code or "", message=job.error_message or "")
        return cls(
            **job.model_dump(exclude={"config", "labels", "error_code", "error_message"}),
            metadata=job.labels,
            config=fill_in(job.config),
            num_epochs=config.epochs,
            error=error if job.error_code else None,
            seconds_left=_estimate_seconds_left(job),
        )


def _estimate_seconds_left(job: Job) -> float | None:
    """Seconds, estimated from the speed of the current attempt."""
    done = job.progress - job.claimed_progress
    seconds = count_seconds(job.claimed_at, utc_now())
    if job.status != JobStatus.running or seconds is None or done <= 0:
        return None
    return round(seconds / done * (1 - job.progress), 1)


class Event(BaseModel):
    """One event of a job; `data` has its values."""

    id: int
    job_id: str
    kind: str = Field(description="an EventKind; later versions may have more")
    message: str
    data: dict[str, Any] | None
    created_at: datetime

    @classmethod
    def of(cls, event: JobEvent) -> Self:
        return cls(**event.model_dump())


class Reconstruction(BaseModel):
    """A picture of ten training grids next to their reconstructions."""

    epoch: int
    is_best: bool = Field(description="by the validation reconstruction loss")
    is_best_by_likelihood: bool = Field(description="by the validation log-likelihood")
    url: str
    sha256: str
    size_bytes: int
    created_at: datetime
    samples: list[dict[str, float | None]] = Field(
        description="values per grid; `loss` is the unweighted cross-entropy per cell in nats, "
        "the same for all options, and so not the job's own loss; `matched_accuracy` and "
        "`matched_recall` are of the reconstruction at the true share of foreground"
    )

    @classmethod
    def of(cls, artifact: Artifact, *, job: Job) -> Self:
        files = f"/jobs/{job.id}/reconstructions"
        return cls(
            **artifact.model_dump(exclude={"samples"}),
            samples=artifact.samples or [],
            is_best=artifact.epoch == job.best_epoch,
            is_best_by_likelihood=artifact.epoch == job.best_likelihood_epoch,
            url=locate(f"{files}/{artifact.epoch}.png?sha256={artifact.sha256}"),
        )


class Checkpoint(BaseModel):
    """Weights and optimizer state after an epoch, with that epoch's metrics."""

    epoch: int
    is_best: bool = Field(description="by the validation reconstruction loss")
    is_best_by_likelihood: bool = Field(description="by the validation log-likelihood")
    url: str
    sha256: str
    size_bytes: int
    created_at: datetime
    metrics: EpochMetrics | None

    @classmethod
    def of(cls, artifact: Artifact, *, job: Job, metrics: EpochMetrics | None) -> Self:
        files = f"/jobs/{job.id}/checkpoints"
        return cls(
            **artifact.model_dump(),
            metrics=metrics,
            is_best=artifact.epoch == job.best_epoch,
            is_best_by_likelihood=artifact.epoch == job.best_likelihood_epoch,
            url=locate(f"{files}/{artifact.epoch}?sha256={artifact.sha256}"),
        )


def describe_reconstructions(job: Job, pictures: Sequence[Artifact]) -> list[Reconstruction]:
    return [Reconstruction.of(picture, job=job) for picture in pictures]


def describe_checkpoints(
    job: Job, checkpoints: Sequence[Artifact], epochs: Sequence[EpochMetrics]
) -> list[Checkpoint]:
    """The checkpoints with the metrics of their epochs."""
    metrics = {row.epoch: row for row in epochs}
    return [
        Checkpoint.of(checkpoint, job=job, metrics=metrics.get(checkpoint.epoch))
        for checkpoint in checkpoints
    ]


def _resolve(preset: Mapping[str, Any]) -> TrainingConfig:
    """The configuration of an option; one of another version as far as this one can read it."""
    try:
        return resolve_config(preset)
    except StoredConfigError:
        return read_config(preset)


class OptionPublic(BaseModel):
    """A loss configuration to compare, and what it resolves to."""

    name: str
    option: str = Field(description="the same as `name`", deprecated=True)
    base: str | None = Field(description="the option from which it was derived")
    config: TrainingConfig = Field(description="the whole configuration of a job with defaults")
    overrides: dict[str, Any] = Field(description="the settings that differ from the base's")
    summary: str
    is_built_in: bool
    num_jobs: int

    @classmethod
    def of(cls, option: Option, *, num_jobs: int) -> Self:
        return cls(
            name=option.name,
            option=option.name,
            base=option.base,
            config=_resolve(option.preset),
            overrides=dict(option.config),
            summary=option.summary,
            is_built_in=option.is_built_in,
            num_jobs=num_jobs,
        )


class JobList(BaseModel):
    data: list[JobPublic]
    has_more: bool


class MetricsList(BaseModel):
    data: list[EpochMetrics]
    has_more: bool


class ReconstructionList(BaseModel):
    data: list[Reconstruction]
    has_more: bool


class CheckpointList(BaseModel):
    data: list[Checkpoint]
    has_more: bool


class OptionList(BaseModel):
    data: list[OptionPublic]
    has_more: bool


class EventList(BaseModel):
    data: list[Event]
    has_more: bool


class DatasetPublic(BaseModel):
    """A data set. A built-in one has no file, so its size and date are null."""

    name: str
    is_built_in: bool
    size_bytes: int | None
    modified_at: datetime | None

    @classmethod
    def of(cls, path: Path) -> Self:
        status = path.stat()
        modified_at = datetime.fromtimestamp(status.st_mtime, UTC)
        return cls(
            name=path.stem, is_built_in=False, size_bytes=status.st_size, modified_at=modified_at
        )


class OverlapPublic(BaseModel):
    exact: int = Field(description="grids that are there as they are")
    by_orbit: int = Field(
        description="grids that are there in one of their eight forms, turned or reflected"
    )


class DatasetDetails(DatasetPublic):
    """A data set and its contents, over all splits."""

    num_grids: dict[str, int] | None = Field(default=None, description="by split")
    grid_size: int | None = None
    colour_counts: list[int] | None = Field(default=None, description="cells of colours 0 to 9")
    background_share: float | None = Field(default=None, description="share of all cells, 0 to 1")
    overlap: dict[str, OverlapPublic] | None = Field(
        default=None,
        description="grids of `val` and `test` that also occur in `train`; of `images`, grids that "
        "repeat an earlier one",
    )
    preview_url: str | None = None
    note: str | None = Field(
        default=None, description="after an upload of another format: what became of the file"
    )


class LeftOutFile(BaseModel):
    """A file in the folder of data sets that is none."""

    file_name: str
    reason: str


class DatasetList(BaseModel):
    data: list[DatasetPublic]
    has_more: bool
    left_out: list[LeftOutFile] = Field(
        default_factory=list, description="other files in the folder, of which the first are here"
    )


class WorkerPublic(BaseModel):
    """A process that claims jobs."""

    id: str
    host: str
    pid: int
    device: str
    version: str
    torch_version: str
    state: WorkerState
    job_id: str | None
    started_at: datetime
    heartbeat_at: datetime
    progress_at: datetime | None = Field(description="when its job last made progress")

    @classmethod
    def of(cls, report: WorkerReport) -> Self:
        return cls(
            **report.worker.model_dump(exclude={"state"}),
            state=report.state,
            progress_at=report.job.progress_at if report.job else None,
        )


class WorkerList(BaseModel):
    data: list[WorkerPublic]
    has_more: bool


class Health(BaseModel):
    status: str
    version: str


class Readiness(BaseModel):
    """Whether jobs can be accepted now, and how many workers would run them."""

    status: Literal["ready", "not_ready"]
    database: bool
    disk: bool = Field(description="the data directory can be written to")
    num_workers: int = Field(description="workers that send heartbeats; without one, jobs wait")


class ComparedJobPublic(BaseModel):
    job: JobPublic
    verdict: Verdict


class ComparisonPublic(BaseModel):
    """Jobs side by side; `reason` says why a job is recommended, or why none can be."""

    criteria_set: CriteriaSet = Field(description="the criteria that the jobs are judged by")
    jobs: list[ComparedJobPublic]
    ranking: list[str] = Field(description="ids from best to worst")
    recommendation: ComparisonRecommendation | None
    reason: str
    groups: list[ArmVerdict] = Field(description="the jobs of each configuration, judged together")
    decision: Recommendation = Field(description="between the groups, as after one look")
    differences: dict[str, dict[str, Any]] = Field(
        description="the configuration keys that differ, by job id"
    )

    @classmethod
    def of(cls, comparison: Comparison) -> Self:
        return cls(
            criteria_set=comparison.criteria_set,
            jobs=[
                ComparedJobPublic(job=JobPublic.of(entry.job), verdict=entry.verdict)
                for entry in comparison.entries
            ],
            ranking=comparison.ranking.ranking,
            recommendation=comparison.recommendation,
            reason=comparison.reason,
            groups=comparison.groups,
            decision=comparison.decision,
            differences=comparison.differences,
        )
