"""One claimed job from top to bottom, and the only place where an error becomes a status."""

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import torch
from sqlalchemy import Engine
from sqlmodel import Session, select

from server import job_queue
from server.artifacts import JobFiles
from server.datasets import DatasetError
from server.job_queue import Lease, LeaseLostError
from server.models import Artifact, ArtifactKind, FailureKind, Job, JobPhase
from server.settings import Settings
from worker.checkpoints import load_newest_checkpoint
from worker.data import Dataset, DeviceGrids, draw_reconstruction_batches, load_dataset
from worker.device import choose_device, describe_device
from worker.heartbeat import Heartbeat, StopReason
from worker.metrics import SplitMetrics
from worker.recorder import NUM_RECONSTRUCTIONS, EpochRecorder
from worker.trackers import open_tracker
from worker.training import NonFiniteLossError, Trainer, TrainingStopped

_logger = logging.getLogger(__name__)
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class Failure(NamedTuple):
    """An error in a researcher's words."""

    code: str
    message: str
    kind: FailureKind


def run_job(
    job: Job, *, settings: Settings, engine: Engine, shutdown: threading.Event | None = None
) -> None:
    """Run a job that this worker has claimed until it ends, is handed back or is lost.

    Setting `shutdown` hands it back after the step under way. Raises nothing that the job
    did; what the database does is the caller's.
    """
    assert job.worker_id is not None, "the job was not claimed"
    lease = Lease(job.id, job.attempt, job.worker_id)
    files = JobFiles(settings.runs_dir, job.id)
    heartbeat = Heartbeat(
        lease, engine=engine, settings=settings, shutdown=shutdown or threading.Event()
    )
    with heartbeat:
        try:
            files.create()
            with _job_log(files):
                _run_logged(job, lease, settings=settings, engine=engine, heartbeat=heartbeat)
        except LeaseLostError as error:
            _logger.warning("%s; nothing more is written", error)
        except TrainingStopped:
            _stop(lease, engine=engine, reason=heartbeat.stop_reason)
        except Exception as error:
            failure = describe_failure(error, job=job)
            _logger.error("job %s failed: %s", job.id, failure.message)
            job_queue.fail(engine, lease, **failure._asdict())


def describe_failure(error: Exception, *, job: Job) -> Failure:
    """Say what went wrong, and whose fault it is."""
    match error:
        case DatasetError():
            return Failure("bad_dataset", str(error), FailureKind.user)
        case NonFiniteLossError():
            return Failure("non_finite_loss", str(error), FailureKind.numeric)
        case torch.OutOfMemoryError() | MemoryError():
            message = (
                f"out of memory with batch_size {job.config['batch_size']}; "
                "a smaller batch_size or num_samples helps"
            )
            return Failure("out_of_memory", message, FailureKind.oom)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            message = f"no space left for the job's files: {error}"
            return Failure("disk_full", message, FailureKind.infrastructure)
        case OSError():
            message = f"the job's files cannot be read or written: {error}"
            return Failure("file_error", message, FailureKind.infrastructure)
        case _:
            message = f"{type(error).__name__}: {error}; the job's log has the traceback"
            return Failure("internal_error", message, FailureKind.infrastructure)


def _run_logged(
    job: Job, lease: Lease, *, settings: Settings, engine: Engine, heartbeat: Heartbeat
) -> None:
    """Train with the job's log open, so that a failure's traceback ends up in it."""
    _logger.info("[JOB] %s: option %s, attempt %d, %s", job.id, job.option, job.attempt, job.config)
    try:
        _train(job, lease, settings=settings, engine=engine, heartbeat=heartbeat)
    except (TrainingStopped, LeaseLostError):
        _logger.info("[JOB] stopped: %s", heartbeat.stop_reason or StopReason.lease_lost)
        raise
    except (DatasetError, NonFiniteLossError) as error:
        _logger.error("[JOB] failed: %s", error)
        raise
    except Exception:
        _logger.exception("[JOB] failed")
        raise


def _train(
    job: Job, lease: Lease, *, settings: Settings, engine: Engine, heartbeat: Heartbeat
) -> None:
    config, device = job.training_config, choose_device()
    files = JobFiles(settings.runs_dir, job.id)
    dataset = load_dataset(config, datasets_dir=settings.datasets_dir, cache_dir=settings.cache_dir)
    trainer = Trainer(
        config,
        dataset,
        device=device,
        should_stop=heartbeat.should_stop,
        on_step=heartbeat.set_progress,
    )
    _resume(trainer, job, engine=engine, files=files)
    job_queue.set_phase(
        engine,
        lease,
        JobPhase.training,
        device=describe_device(device),
        dataset_summary=_summarise(dataset, trainer=trainer),
    )
    tracker = open_tracker(job, wandb_project=settings.wandb_project)
    recorder = EpochRecorder(
        job,
        lease,
        engine=engine,
        files=files,
        tracker=tracker,
        sample_batches=draw_reconstruction_batches(
            dataset.train,
            num_samples=NUM_RECONSTRUCTIONS,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
    )
    try:
        for result in trainer.epochs():
            recorder.record(result, trainer)
        job_queue.set_phase(engine, lease, JobPhase.saving)
        recorder.wait()
    finally:
        recorder.close()
        tracker.close()
    job_queue.set_phase(engine, lease, JobPhase.evaluating)
    test_metrics = _evaluate_best(trainer, dataset, job=job, engine=engine, files=files)
    job_queue.finish(engine, lease, test_metrics=asdict(test_metrics))
    _logger.info("[JOB] succeeded")


def _resume(trainer: Trainer, job: Job, *, engine: Engine, files: JobFiles) -> None:
    """Go on from the newest good checkpoint, if an earlier attempt left one."""
    loaded = load_newest_checkpoint(files, _checkpoint_rows(engine, job.id))
    if loaded is not None:
        state, epoch = loaded
        trainer.load_state_dict(state, epoch=epoch)
        _logger.info("[JOB] resumed after epoch %d", epoch)


def _evaluate_best(
    trainer: Trainer, dataset: Dataset, *, job: Job, engine: Engine, files: JobFiles
) -> SplitMetrics:
    """Measure the test split with the weights of the best epoch."""
    with Session(engine) as session:
        best_epoch = session.exec(select(Job.best_epoch).where(Job.id == job.id)).one()
    rows = [row for row in _checkpoint_rows(engine, job.id) if row.epoch == best_epoch]
    loaded = load_newest_checkpoint(files, rows)
    if loaded is None:
        raise FileNotFoundError(f"the best checkpoint, of epoch {best_epoch}, cannot be loaded")
    trainer.load_state_dict(loaded[0], epoch=trainer.epoch)
    return trainer.evaluate(
        DeviceGrids(dataset.test, device=trainer.device), beta=job.training_config.beta
    )


def _checkpoint_rows(engine: Engine, job_id: str) -> list[Artifact]:
    checkpoints = select(Artifact).where(
        Artifact.job_id == job_id, Artifact.kind == ArtifactKind.checkpoint
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
        "colour_counts": counts,
        "background_share": counts[0] / sum(counts),
        "class_weights": [round(weight, 4) for weight in trainer.class_weights.tolist()],
    }


def _stop(lease: Lease, *, engine: Engine, reason: StopReason | None) -> None:
    match reason:
        case StopReason.cancelled:
            job_queue.acknowledge_cancel(engine, lease)
        case StopReason.shutdown:
            job_queue.hand_back(engine, lease, reason=f"worker {lease.worker_id} was stopped")
        case StopReason.lease_lost | None:
            _logger.warning("job %s belongs to another worker now", lease.job_id)


@contextmanager
def _job_log(files: JobFiles) -> Iterator[None]:
    """Send what the worker logs to the job's own log as well."""
    handler = logging.FileHandler(files.log_path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
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
