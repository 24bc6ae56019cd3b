"""One claimed job from top to bottom, and the only place where an error becomes a status."""

import errno
import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import torch
from sqlalchemy import Engine, and_
from sqlmodel import Session, col, select

from server import job_queue, job_records
from server.artifacts import JobFiles
from server.database import is_outage
from server.datasets import DatasetError
from server.leases import LeaseLostError
from server.logs import LineFormatter
from server.models import (
    Artifact,
    ArtifactKind,
    EpochMetrics,
    EventKind,
    FailureKind,
    Job,
    JobPhase,
    ResumePoint,
)
from server.reaper import Reaper
from server.settings import Settings
from worker.attempt import Attempt, open_attempt
from worker.checkpoints import load_first_state, load_newest_state
from worker.data import Dataset, DeviceGrids, draw_reconstruction_batches, load_dataset
from worker.device import choose_device, describe_device
from worker.heartbeat import StopReason
from worker.metrics import SplitMetrics
from worker.recorder import NUM_RECONSTRUCTIONS, EpochRecorder
from worker.trackers import Tracker, open_tracker
from worker.training import NonFiniteLossError, Trainer, TrainingStopped

_logger = logging.getLogger(__name__)
_DEVICE_FAILED = "device_failed"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class DeviceBrokenError(Exception):
    """The accelerator failed; this process cannot use it any more and must be replaced."""


class Failure(NamedTuple):
    """An error in a researcher's words."""

    code: str
    message: str
    kind: FailureKind


def run_job(
    job: Job,
    *,
    settings: Settings,
    engine: Engine,
    shutdown: threading.Event | None = None,
    reaper: Reaper | None = None,
) -> None:
    """Run a job that this worker has claimed until it ends, is handed back or is lost.

    Setting `shutdown` hands it back after the step under way. Raises DeviceBrokenError once
    the job has been told; raises nothing else that the job or the database did.
    """
    attempt = open_attempt(
        job,
        settings=settings,
        engine=engine,
        shutdown=shutdown or threading.Event(),
        reaper=reaper or Reaper(engine, settings=settings),
    )
    with attempt.heartbeat:
        try:
            _run_to_its_end(attempt)
        except LeaseLostError as error:
            _logger.warning("%s; nothing more is written", error)
        except Exception as error:
            if not is_outage(error):
                raise
            _logger.error("the database is away; job %s is left to its lease: %s", job.id, error)
    # A trainer refers to itself, and exceptions to what they passed through: left alone, the memory
    # of its device would still be taken when the next job needs it.
    gc.collect()


def describe_failure(error: Exception, *, job: Job) -> Failure:
    """Say what went wrong, and whose fault it is."""
    match error:
        case DatasetError():
            return Failure("bad_dataset", str(error), FailureKind.user)
        case NonFiniteLossError():
            return Failure("non_finite_loss", str(error), FailureKind.numeric)
        case _ if _is_out_of_memory(error):
            message = (
                f"out of memory with batch_size {job.config['batch_size']}; "
                "a smaller batch_size or num_samples helps"
            )
            return Failure("out_of_memory", message, FailureKind.oom)
        case _ if _is_device_failure(error):
            message = f"the device failed: {str(error).partition(chr(10))[0]}"
            return Failure(_DEVICE_FAILED, message, FailureKind.infrastructure)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            message = f"no space left for the job's files: {error}; resume the job once there is"
            return Failure("disk_full", message, FailureKind.infrastructure)
        case OSError():
            message = f"the job's files cannot be read or written: {error}"
            return Failure("file_error", message, FailureKind.infrastructure)
        case _:
            message = f"{type(error).__name__}: {error}; the job's log has the traceback"
            return Failure("internal_error", message, FailureKind.infrastructure)


def _is_out_of_memory(error: Exception) -> bool:
    # Neither the allocator of the CPU nor CUDA's libraries have an exception type for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(
        error,
        "DefaultCPUAllocator",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )


def _is_device_failure(error: Exception) -> bool:
    # What CUDA's libraries report has no exception type of its own either.
    return isinstance(error, torch.AcceleratorError) or _says(
        error, "CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS"
    )


def _says(error: Exception, *words: str) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _run_to_its_end(attempt: Attempt) -> None:
    """Run the attempt and leave the job in the status that follows. Raises LeaseLostError, what
    an outage raises, and DeviceBrokenError."""
    try:
        attempt.files.create()
        with _job_log(attempt.files):
            _run_logged(attempt)
    except TrainingStopped:
        _stop(attempt)
    except LeaseLostError:
        raise
    except Exception as error:
        if is_outage(error):
            raise
        failure = describe_failure(error, job=attempt.job)
        _logger.error("job %s failed: %s", attempt.job.id, failure.message)
        try:
            _fail(attempt, failure)
        finally:
            if failure.code == _DEVICE_FAILED:
                # Also if nobody could be told: this process must not claim another job.
                raise DeviceBrokenError(failure.message) from error


def _fail(attempt: Attempt, failure: Failure) -> None:
    settings = attempt.settings
    attempt.write(
        job_queue.fail,
        **failure._asdict(),
        max_attempts=settings.max_attempts,
        retry_seconds=settings.retry_seconds,
    )


def _run_logged(attempt: Attempt) -> None:
    """Train with the job's log open, so that a failure's traceback ends up in it."""
    job = attempt.job
    _logger.info("[JOB] %s: option %s, attempt %d, %s", job.id, job.option, job.attempt, job.config)
    try:
        _run(attempt)
    except (TrainingStopped, LeaseLostError):
        _logger.info("[JOB] stopped: %s", attempt.heartbeat.stop_reason or StopReason.lease_lost)
        raise
    except (DatasetError, NonFiniteLossError) as error:
        _logger.error("[JOB] failed: %s", error)
        raise
    except Exception:
        _logger.exception("[JOB] failed")
        raise


def _run(attempt: Attempt) -> None:
    """Everything a job does, in order."""
    # What a killed worker was writing when it ended goes first.
    attempt.write(job_records.keep_named_files, sweep=attempt.files.sweep)
    config, settings, job = attempt.job.training_config, attempt.settings, attempt.job
    dataset = load_dataset(config, datasets_dir=settings.datasets_dir, cache_dir=settings.cache_dir)
    tracker = open_tracker(job, wandb_project=settings.wandb_project, warn=attempt.warn)
    try:
        trainer = _train(attempt, dataset, tracker=tracker)
    finally:
        tracker.close()
    attempt.write(job_records.set_phase, JobPhase.evaluating)
    test_metrics = _evaluate_best(trainer, dataset, attempt=attempt)
    attempt.write(job_queue.finish, test_metrics=asdict(test_metrics))
    _logger.info("[JOB] succeeded")


def _train(attempt: Attempt, dataset: Dataset, *, tracker: Tracker) -> Trainer:
    """Run the epochs that are left; all of them are stored on return."""
    config, device = attempt.job.training_config, choose_device()
    samples = draw_reconstruction_batches(
        dataset.train,
        num_samples=NUM_RECONSTRUCTIONS,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    recorder = EpochRecorder(attempt, tracker=tracker, sample_batches=samples)

    def on_step(trainer: Trainer) -> None:
        attempt.heartbeat.set_progress(trainer.progress)
        recorder.save_if_due(trainer)

    should_stop = attempt.heartbeat.should_stop
    try:
        trainer = Trainer(config, dataset, device=device, should_stop=should_stop, on_step=on_step)
        summary = _summarise(dataset, trainer=trainer)
        _check_same_data(attempt.job, summary)
        _resume(trainer, attempt)
        attempt.write(
            job_records.record_start,
            device=describe_device(device),
            progress=trainer.progress,
            dataset_summary=summary,
        )
        _record_epochs(trainer, recorder, attempt=attempt)
    finally:
        recorder.close()
    return trainer


def _record_epochs(trainer: Trainer, recorder: EpochRecorder, *, attempt: Attempt) -> None:
    try:
        for result in trainer.epochs():
            recorder.record(result, trainer)
    except TrainingStopped:
        if attempt.heartbeat.stop_reason is not StopReason.lease_lost:
            recorder.save(trainer)
            recorder.wait()
        raise
    except Exception:
        # Whatever ended this epoch, those before it are worth keeping.
        recorder.wait()
        raise
    attempt.write(job_records.set_phase, JobPhase.saving)
    recorder.wait()


def _resume(trainer: Trainer, attempt: Attempt) -> None:
    """Go on from the newest good state, if an earlier attempt left one."""
    job = attempt.job
    point = ResumePoint.model_validate(job.resume_point) if job.resume_point else None
    rows = attempt.retrying(_checkpoint_rows, attempt.engine, job.id)
    state = load_newest_state(attempt.files, rows, resume_point=point, warn=attempt.warn)
    if state is None:
        if rows or point:
            attempt.warn("none of the job's checkpoints can be loaded; it starts over")
        return
    if not trainer.load_state(state):
        attempt.warn("saved on another kind of device: this epoch's random numbers are drawn anew")
    message = f"resumed after epoch {state.epoch}"
    if state.step:
        message += f", step {state.step} of {trainer.steps_per_epoch}"
    _logger.info("[JOB] %s", message)
    attempt.write(job_records.add_note, EventKind.resumed, message=message)


def _evaluate_best(trainer: Trainer, dataset: Dataset, *, attempt: Attempt) -> SplitMetrics:
    """Measure the test split with the weights of the best epoch."""
    best_first = attempt.retrying(_best_checkpoint_rows, attempt.engine, attempt.job.id)
    state = load_first_state(attempt.files, best_first, warn=attempt.warn)
    if state is not None:
        trainer.load_weights(state)
    if state is None or state.epoch != best_first[0].epoch:
        used = "the last epoch's weights" if state is None else f"epoch {state.epoch}, next best,"
        message = f"the best checkpoint cannot be loaded; {used} measured on the test split"
        attempt.warn(message)
    return trainer.evaluate(
        DeviceGrids(dataset.test, device=trainer.device), beta=attempt.job.training_config.beta
    )


def _checkpoint_rows(engine: Engine, job_id: str) -> list[Artifact]:
    checkpoints = select(Artifact).where(
        Artifact.job_id == job_id, Artifact.kind == ArtifactKind.checkpoint
    )
    with Session(engine) as session:
        return list(session.exec(checkpoints))


def _best_checkpoint_rows(engine: Engine, job_id: str) -> list[Artifact]:
    """The best epoch's first: the one of the lowest validation reconstruction loss."""
    epoch = and_(
        col(EpochMetrics.job_id) == col(Artifact.job_id),
        col(EpochMetrics.epoch) == col(Artifact.epoch),
    )
    checkpoints = (
        select(Artifact)
        .join(EpochMetrics, epoch)
        .where(Artifact.job_id == job_id, Artifact.kind == ArtifactKind.checkpoint)
        .order_by(col(EpochMetrics.val_recon_loss), col(EpochMetrics.epoch))
    )
    with Session(engine) as session:
        return list(session.exec(checkpoints))


def _summarise(dataset: Dataset, *, trainer: Trainer) -> dict[str, object]:
    """What the training split looks like, for the job's readers."""
    counts = dataset.count_colours()
    return {
        "num_train": len(dataset.train),
        "num_val": len(dataset.val),
        "num_test": len(dataset.test),
        "grid_size": dataset.grid_size,
        "sha256": dataset.compute_sha256(),
        "colour_counts": counts,
        "background_share": counts[0] / sum(counts),
        "class_weights": [round(weight, 4) for weight in trainer.class_weights.tolist()],
    }


def _check_same_data(job: Job, summary: dict[str, object]) -> None:
    """Raises DatasetError if an earlier attempt trained on other grids under the same name."""
    known = (job.dataset_summary or {}).get("sha256", summary["sha256"])
    if known != summary["sha256"]:
        name = job.config["dataset"]
        raise DatasetError(
            f"the data set {name!r} is not the one that this job began with; bring that one back "
            "and resume the job, or post a new one"
        )


def _stop(attempt: Attempt) -> None:
    """Leave a job whose state is saved to whoever goes on with it, or to nobody."""
    worker_id = attempt.lease.worker_id
    match attempt.heartbeat.stop_reason:
        case StopReason.requested:
            attempt.write(job_queue.stop)
        case StopReason.shutdown:
            attempt.write(job_queue.hand_back, reason=f"worker {worker_id} was stopped")
        case StopReason.overdue:
            limit = attempt.settings.max_job_seconds
            message = f"trained for more than {limit:g} s (LOSSLAB_MAX_JOB_SECONDS); resume goes on"
            attempt.write(
                job_queue.fail,
                code="timeout",
                message=message,
                kind=FailureKind.timeout,
            )
        case StopReason.lease_lost | None:
            _logger.warning("job %s belongs to another worker now", attempt.job.id)


@contextmanager
def _job_log(files: JobFiles) -> Iterator[None]:
    """Send what the worker logs to the job's own log as well."""
    handler = logging.FileHandler(files.log_path, encoding="utf-8")
    handler.setFormatter(LineFormatter(_LOG_FORMAT))
    worker_logger = logging.getLogger("worker")
    level = worker_logger.level
    # The job's log is whole, whatever the process shows of it.
    worker_logger.setLevel(min(level or logging.INFO, logging.INFO))
    worker_logger.addHandler(handler)
    try:
        yield
    finally:
        worker_logger.removeHandler(handler)
        worker_logger.setLevel(level)
        handler.close()
