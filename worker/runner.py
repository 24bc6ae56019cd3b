"""One claimed job from top to bottom; the only place where an error becomes a status."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

import torch
from sqlalchemy import Engine

from server.database.engine import is_outage
from server.files.artifacts import JobFiles
from server.files.npz import DatasetError
from server.jobs import queue, records
from server.jobs.leases import LeaseLostError
from server.jobs.reaper import Reaper
from server.logs import FileLog, LineFormatter, is_of_job, mark_job
from server.models.tables import (
    Artifact,
    BestBy,
    EventKind,
    FailureKind,
    Job,
    JobPhase,
    ResumePoint,
)
from server.settings import Settings
from worker.attempt import Attempt, open_attempt
from worker.checkpoints import load_first_state, load_newest_state
from worker.data import Dataset, DeviceGrids, load_dataset
from worker.device import choose_device, describe_device
from worker.evaluation import EvaluationMetrics
from worker.failures import DeviceBrokenError, Failure, describe_failure
from worker.heartbeat import StopReason
from worker.losses import find_weight_faults
from worker.provenance import describe_provenance
from worker.recorder import EpochRecorder
from worker.redrawing import draw_samples, redraw_lost_pictures
from worker.step import StepPath
from worker.trackers import TrackerGroup
from worker.training import NonFiniteLossError, Trainer, TrainingState, TrainingStopped

_logger = logging.getLogger(__name__)
_TEST_COLUMNS: Final = {
    BestBy.loss: "test_metrics",
    BestBy.likelihood: "likelihood_test_metrics",
}
#: Jobs that run at the same time open and close their logs one after another.
_changing_logs = threading.Lock()
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def run_job(
    job: Job,
    *,
    settings: Settings,
    engine: Engine,
    shutdown: threading.Event | None = None,
    reaper: Reaper | None = None,
    give_up_slot: Callable[[], bool] = lambda: False,
) -> Failure | None:
    """Run a job that this worker has claimed until it ends, is handed back or is lost.

    Returns the failure with which the attempt ended, if any was stored. Setting `shutdown` hands
    the job back after the current step. So does a lack of memory, if `give_up_slot` returns True:
    fewer jobs run at the same time from then on. Raises DeviceBrokenError after the failure was
    stored; no other error of the job or the database leaves this function.
    """
    with mark_job(job.id):
        attempt = open_attempt(
            job,
            settings=settings,
            engine=engine,
            shutdown=shutdown or threading.Event(),
            reaper=reaper or Reaper(engine, settings=settings),
            give_up_slot=give_up_slot,
        )
        failure = _run_with_heartbeat(attempt)
    # A trainer refers to itself, and exceptions refer to their frames: without this, the device's
    # memory would still be in use when the next job needs it.
    gc.collect()
    return failure


def _run_with_heartbeat(attempt: Attempt) -> Failure | None:
    """Raises DeviceBrokenError."""
    with attempt.heartbeat:
        try:
            return _run_to_its_end(attempt)
        except LeaseLostError as error:
            _logger.warning("%s; nothing more is written", error)
        except Exception as error:
            if not is_outage(error):
                raise
            _logger.error(
                "the database is away; job %s is requeued when its lease expires: %s",
                attempt.job.id,
                error,
            )
    return None


def _run_to_its_end(attempt: Attempt) -> Failure | None:
    """Run the attempt and store the job's new status; returns the failure, if there was one.

    Raises LeaseLostError, DeviceBrokenError and what an outage raises.
    """
    try:
        attempt.files.create()
        with _job_log(attempt.files, job_id=attempt.job.id):
            _run_logged(attempt)
    except TrainingStopped:
        _stop(attempt)
    except LeaseLostError:
        raise
    except Exception as error:
        if is_outage(error):
            raise
        failure = describe_failure(error, job=attempt.job)
        if failure.kind is FailureKind.oom and attempt.give_up_slot():
            attempt.write(queue.hand_back, reason="no memory was left beside other jobs")
            return None
        _logger.error("job %s failed: %s", attempt.job.id, failure.message)
        try:
            _fail(attempt, failure)
        finally:
            if failure.is_of_device:
                # Also if the job could not be told: this process must not claim another one.
                raise DeviceBrokenError(failure.message) from error
        return failure
    return None


def _fail(attempt: Attempt, failure: Failure) -> None:
    settings = attempt.settings
    attempt.write(
        queue.fail,
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
    # First remove files that a killed worker left incomplete.
    attempt.write(records.keep_named_files, files=attempt.files)
    config, settings, job = attempt.job.trainable_config, attempt.settings, attempt.job
    dataset = load_dataset(config, datasets_dir=settings.datasets_dir, cache_dir=settings.cache_dir)
    trackers = TrackerGroup(job, settings=settings, warn=attempt.warn)
    try:
        trainer = _train(attempt, dataset, trackers=trackers)
    finally:
        trackers.close()
    attempt.write(records.set_phase, JobPhase.evaluating)
    measured = _evaluate_bests(trainer, dataset, attempt=attempt)
    columns = {column: asdict(metrics) for column, metrics in measured.items()}
    redraw_lost_pictures(trainer, dataset, attempt=attempt)
    attempt.write(queue.finish, **columns)
    _logger.info("[JOB] succeeded")


def _train(attempt: Attempt, dataset: Dataset, *, trackers: TrackerGroup) -> Trainer:
    """Run the remaining epochs; all of them are stored on return."""
    config, device = attempt.job.trainable_config, choose_device()
    samples = draw_samples(dataset, config=config)
    recorder = EpochRecorder(attempt, trackers=trackers, sample_batches=samples)

    def on_step(trainer: Trainer) -> None:
        attempt.heartbeat.set_progress(trainer.progress)
        recorder.save_if_due(trainer)

    should_stop = attempt.heartbeat.should_stop
    try:
        trainer = Trainer(config, dataset, device=device, should_stop=should_stop, on_step=on_step)
        summary = _summarise(dataset, trainer=trainer)
        _check_same_data(attempt.job, summary)
        _resume(trainer, attempt)
        if not trainer.prepare():
            attempt.warn(f"the steps are {trainer.path} now: the numbers differ by rounding")
        attempt.write(
            records.record_start,
            device=_describe(trainer),
            progress=trainer.progress,
            dataset_summary=summary,
            provenance=describe_provenance(trainer, worker_id=attempt.lease.worker_id),
            warnings=_list_new_warnings(attempt.job, summary, trainer=trainer),
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
        # Whatever ended this epoch, those before it should be stored.
        recorder.wait()
        raise
    attempt.write(records.set_phase, JobPhase.saving)
    recorder.wait()


def _describe(trainer: Trainer) -> str:
    """The device, and how it is told what to do if not one operation after the other."""
    device = describe_device(trainer.device)
    return device if trainer.path is StepPath.plain else f"{device}, {trainer.path} steps"


def _resume(trainer: Trainer, attempt: Attempt) -> None:
    """Continue from the newest valid state, if an earlier attempt left one."""
    job = attempt.job
    point = ResumePoint.model_validate(job.resume_point) if job.resume_point else None
    rows = attempt.retrying(records.read_checkpoints, attempt.engine, job.id)
    state = load_newest_state(attempt.files, rows, resume_point=point, warn=attempt.warn)
    if state is None:
        if rows or point:
            attempt.warn("none of the job's checkpoints can be loaded; it starts over")
        return
    if not trainer.load_state(state):
        message = "saved on another kind of device: the rest of this epoch has other random numbers"
        attempt.warn(message)
    message = f"resumed after epoch {state.epoch}"
    if state.step:
        message += f", step {state.step} of {trainer.steps_per_epoch}"
    _logger.info("[JOB] %s", message)
    attempt.write(records.add_note, EventKind.resumed, message=message)


def _evaluate_bests(
    trainer: Trainer, dataset: Dataset, *, attempt: Attempt
) -> dict[str, EvaluationMetrics]:
    """The test split's metrics by their column: with the weights of the best epoch by loss and of
    the best by likelihood. An epoch that is both is measured once."""
    grids, last_state = DeviceGrids(dataset.test, device=trainer.device), trainer.copy_state()
    by_epoch: dict[int | None, EvaluationMetrics] = {}
    columns = {}
    for by, column in _TEST_COLUMNS.items():
        best_first = attempt.retrying(
            records.read_checkpoints_best_first, attempt.engine, attempt.job.id, by=by
        )
        best_epoch = best_first[0].epoch if best_first else None
        if best_epoch is None and by is not BestBy.loss:
            continue  # an older version recorded all epochs
        if best_epoch not in by_epoch:
            state = _load_best(best_first, attempt=attempt) or last_state
            trainer.load_weights(state)
            by_epoch[best_epoch] = trainer.evaluate(grids, beta=trainer.config.beta)
        columns[column] = by_epoch[best_epoch]
    return columns


def _load_best(best_first: list[Artifact], *, attempt: Attempt) -> TrainingState | None:
    """The state of the first of the checkpoints that can be loaded."""
    state = load_first_state(attempt.files, best_first, warn=attempt.warn)
    if state is None or state.epoch != best_first[0].epoch:
        used = "the last epoch's weights" if state is None else f"epoch {state.epoch}, next best,"
        message = f"the best checkpoint cannot be loaded; {used} measured on the test split"
        attempt.warn(message)
    return state


def _summarise(dataset: Dataset, *, trainer: Trainer) -> dict[str, Any]:
    """A summary of the data set, for the job's page and for later attempts."""
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
        "overlap": {name: each._asdict() for name, each in dataset.measure_overlap().items()},
        **({"num_available": dataset.num_available} if dataset.num_available else {}),
    }


def _list_new_warnings(job: Job, summary: dict[str, Any], *, trainer: Trainer) -> list[str]:
    """What is doubtful about the data and their weights, unless an earlier attempt has said it."""
    if "overlap" in (job.dataset_summary or {}):
        return []
    weights, counts = trainer.class_weights.cpu(), torch.tensor(summary["colour_counts"])
    found = find_weight_faults(weights, counts=counts, config=trainer.config)
    found += describe_sample(summary)
    found += [
        f"{overlap['exact']:,} of {summary[f'num_{split}']:,} {name} grids also occur in training, "
        f"{overlap['by_orbit']:,} if turned or reflected"
        for split, name in {"val": "validation", "test": "test"}.items()
        if (overlap := summary["overlap"][split])["by_orbit"]
    ]
    for message in found:
        _logger.warning(message)
    return found


def describe_sample(summary: dict[str, Any]) -> list[str]:
    """How many grids of how many are used, if `num_samples` leaves out some."""
    available = summary.get("num_available")
    if not available:
        return []
    parts = [
        f"{summary[f'num_{split}']:,} of {available[split]:,} {name} grids"
        for split, name in {"train": "training", "val": "validation", "test": "test"}.items()
    ]
    return [f"num_samples leaves out a part of the data set; used are {', '.join(parts)}"]


def _check_same_data(job: Job, summary: dict[str, Any]) -> None:
    """Raises DatasetError if an earlier attempt trained on other grids under the same name."""
    known = (job.dataset_summary or {}).get("sha256", summary["sha256"])
    if known != summary["sha256"]:
        name = job.training_config.dataset
        raise DatasetError(
            f"the data set {name!r} is not the one that this job began with; restore the original "
            "data set and resume the job, or post a new one"
        )


def _stop(attempt: Attempt) -> None:
    """End a stopped attempt, whose state is saved, as its reason asks."""
    worker_id = attempt.lease.worker_id
    match attempt.heartbeat.stop_reason:
        case StopReason.requested:
            attempt.write(queue.stop)
        case StopReason.shutdown:
            attempt.write(queue.hand_back, reason=f"worker {worker_id} was stopped")
        case StopReason.overdue:
            limit = attempt.settings.max_job_seconds
            message = f"trained for more than {limit:g} s (LOSSLAB_MAX_JOB_SECONDS); resume goes on"
            attempt.write(
                queue.fail,
                code="timeout",
                message=message,
                kind=FailureKind.timeout,
            )
        case StopReason.lease_lost | None:
            _logger.warning("job %s belongs to another worker now", attempt.job.id)


@contextmanager
def _job_log(files: JobFiles, *, job_id: str) -> Iterator[None]:
    """Send what the worker logs about the job to the job's own log as well."""
    handler = FileLog(files.log_path)
    handler.addFilter(is_of_job(job_id))
    handler.setFormatter(LineFormatter(_LOG_FORMAT))
    worker_logger = logging.getLogger("worker")
    with _changing_logs:
        # The job's log is complete, whatever level the process itself shows.
        worker_logger.setLevel(logging.INFO)
        worker_logger.addHandler(handler)
    try:
        yield
    finally:
        with _changing_logs:
            worker_logger.removeHandler(handler)
            if not worker_logger.handlers:
                worker_logger.setLevel(logging.NOTSET)
        handler.close()
