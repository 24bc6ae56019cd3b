"""Epochs that a separate thread stores, while the database is slow."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import SubmitJob, read, read_rows
from fault_worker import wait_for
from sqlalchemy import Engine

from server.jobs import queue
from server.jobs.reaper import Reaper
from server.models.tables import Job
from server.settings import Settings
from worker.attempt import Attempt, open_attempt
from worker.data import draw_reconstruction_batches, load_dataset
from worker.recorder import MAX_PENDING, EpochRecorder
from worker.redrawing import NUM_RECONSTRUCTIONS
from worker.runner import _record_epochs
from worker.trackers import TrackerGroup
from worker.training import NonFiniteLossError, Trainer

OnStep = Callable[[Trainer], None]


@contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """No other process can write to the database meanwhile."""
    connection = sqlite3.connect(settings.data_dir / "losslab.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


def begin_attempt(job: Job, *, settings: Settings, engine: Engine) -> Attempt:
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=600, job_id=job.id)
    assert claimed is not None
    reaper, shutdown = Reaper(engine, settings=settings), threading.Event()
    attempt = open_attempt(
        claimed,
        settings=settings,
        engine=engine,
        shutdown=shutdown,
        reaper=reaper,
        give_up_slot=lambda: False,
    )
    attempt.files.create()
    return attempt


def prepare(attempt: Attempt, *, on_step: OnStep) -> tuple[Trainer, EpochRecorder]:
    config, settings = attempt.job.training_config, attempt.settings
    dataset = load_dataset(config, datasets_dir=settings.datasets_dir, cache_dir=settings.cache_dir)
    samples = draw_reconstruction_batches(
        dataset.train, num_samples=NUM_RECONSTRUCTIONS, batch_size=config.batch_size, seed=0
    )
    trackers = TrackerGroup(attempt.job, settings=settings, warn=attempt.warn)
    recorder = EpochRecorder(attempt, trackers=trackers, sample_batches=samples)
    return Trainer(config, dataset, device=torch.device("cpu"), on_step=on_step), recorder


def test_epochs_before_a_failure_are_stored_though_the_database_was_busy(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job(epochs=6)
    attempt = begin_attempt(job, settings=settings, engine=engine)
    has_failed = threading.Event()

    def fail_in_the_fourth_epoch(trainer: Trainer) -> None:
        if trainer.epoch == 3:
            trainer.class_weights.fill_(torch.nan)
            has_failed.set()

    def hold_the_lock() -> None:
        with locked(settings):
            is_locked.set()
            has_failed.wait(60)
            time.sleep(0.5)

    is_locked = threading.Event()
    trainer, recorder = prepare(attempt, on_step=fail_in_the_fourth_epoch)
    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    is_locked.wait(60)
    with pytest.raises(NonFiniteLossError, match="epoch 4"):
        _record_epochs(trainer, recorder, attempt=attempt)
    recorder.close()
    holder.join()
    assert [row.epoch for row in read_rows(engine, job)] == [1, 2, 3]


def test_training_is_no_more_than_a_few_epochs_ahead_of_the_database(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job(epochs=2 * MAX_PENDING)
    attempt = begin_attempt(job, settings=settings, engine=engine)
    trainer, recorder = prepare(attempt, on_step=lambda _trainer: None)
    training = threading.Thread(
        target=_record_epochs, args=(trainer, recorder), kwargs={"attempt": attempt}
    )
    with locked(settings):
        training.start()
        wait_for(lambda: trainer.epoch > MAX_PENDING)
        # An epoch takes some hundredths of a second.
        time.sleep(1.0)
        assert trainer.epoch == MAX_PENDING + 1
        assert read(engine, job).epochs_completed == 0
    training.join()
    recorder.close()
    assert len(read_rows(engine, job)) == 2 * MAX_PENDING
