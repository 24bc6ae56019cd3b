"""A claimed job from its start to its end, with real files."""

import gc
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SubmitJob, drain, numbers, read, read_artifacts, read_rows
from safetensors.torch import save_file
from sqlalchemy import Engine, text
from sqlmodel import Session, select

from server.files.artifacts import JobFiles
from server.files.hashes import compute_sha256
from server.jobs import queue
from server.models.epochs import EpochMetrics
from server.models.tables import Artifact, FailureKind, Job, JobEvent, JobStatus
from server.settings import Settings
from worker.checkpoints import load_checkpoint, save_checkpoint
from worker.failures import describe_failure
from worker.runner import run_job
from worker.training import Trainer


def read_warnings(engine: Engine, job: Job) -> list[str]:
    warnings = select(JobEvent.message).where(JobEvent.job_id == job.id, JobEvent.kind == "warning")
    with Session(engine) as session:
        return list(session.exec(warnings))


def checkpoints_dir(settings: Settings, job: Job) -> Path:
    return settings.runs_dir / job.id / "checkpoints"


def test_job_ends_with_metrics_checkpoints_pictures_and_log(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job("b", epochs=3)
    drain(settings, engine)
    job = read(engine, submitted)
    assert job.status is JobStatus.succeeded, job.error_message
    assert [row.epoch for row in read_rows(engine, job)] == [1, 2, 3]
    names = {path.name for path in checkpoints_dir(settings, job).iterdir()}
    assert names == {
        *(f"checkpoint_epoch_{n}.safetensors" for n in (1, 2, 3)),
        *(f"reconstructions_epoch_{n}.png" for n in (1, 2, 3)),
        "best.safetensors",
        "reconstructions_best.png",
    }
    log = JobFiles(settings.runs_dir, job.id).read_log()
    assert "[VISUALIZATION] Saved: reconstructions_epoch_3.png" in log
    assert job.test_metrics is not None
    assert job.dataset_summary is not None
    assert job.dataset_summary["num_train"] == 160


def test_two_jobs_at_the_same_time_have_the_numbers_and_logs_of_each_alone(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    alone = [submit_job(option, epochs=3, seed=7) for option in "bc"]
    drain(settings, engine)
    together = [submit_job(option, epochs=3, seed=7) for option in "bc"]
    claimed = [queue.claim(engine, worker_id=f"w{n}", lease_seconds=60) for n in range(2)]
    threads = [
        threading.Thread(
            target=run_job, args=[job], kwargs={"settings": settings, "engine": engine}
        )
        for job in claimed
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for before, job in zip(alone, together, strict=True):
        rows = [[numbers(row) for row in read_rows(engine, each)] for each in (before, job)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 3
        log = JobFiles(settings.runs_dir, job.id).read_log()
        assert [
            line.partition("[EPOCH ")[2][:1] for line in log.splitlines() if "[EPOCH" in line
        ] == [
            "1",
            "2",
            "3",
        ]
        assert f"[JOB] {job.id}: option {job.option}" in log
        assert log.count("[JOB] succeeded") == 1


def test_rows_name_files_that_exist_and_verify(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    drain(settings, engine)
    for artifact in read_artifacts(engine, job):
        path = checkpoints_dir(settings, job) / artifact.file_name
        assert compute_sha256(path) == artifact.sha256
        assert path.stat().st_size == artifact.size_bytes


def test_best_files_are_those_of_the_epoch_with_the_lowest_reconstruction_loss(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=4)
    drain(settings, engine)
    job, rows = read(engine, submitted), read_rows(engine, submitted)
    best = min(rows, key=lambda row: row.val_recon_loss)
    assert job.best_epoch == best.epoch
    folder = checkpoints_dir(settings, job)
    for best_name, name in (
        ("best.safetensors", f"checkpoint_epoch_{best.epoch}.safetensors"),
        ("reconstructions_best.png", f"reconstructions_epoch_{best.epoch}.png"),
    ):
        assert (folder / best_name).read_bytes() == (folder / name).read_bytes()


def test_checkpoints_off_the_schedule_are_kept_only_while_they_are_the_best(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=5, checkpoint_every=2)
    drain(settings, engine)
    job = read(engine, submitted)
    kept = {a.epoch for a in read_artifacts(engine, job) if a.kind == "checkpoint"}
    assert kept == {2, 4, 5} | {job.best_epoch, job.best_likelihood_epoch}
    on_disk = {p.name for p in checkpoints_dir(settings, job).glob("checkpoint_*")}
    assert on_disk == {f"checkpoint_epoch_{epoch}.safetensors" for epoch in kept}


def test_pictures_carry_ten_samples_of_the_same_grids_each_epoch(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    drain(settings, engine)
    pictures = [a for a in read_artifacts(engine, job) if a.kind == "reconstruction"]
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.samples is not None
        assert len(picture.samples) == 10
        assert set(picture.samples[0]) == {
            *("pixel_accuracy", "foreground_recall", "loss"),
            *("matched_accuracy", "matched_recall"),
        }
        assert all(sample["matched_accuracy"] is not None for sample in picture.samples)


def test_checkpoint_holds_weights_adam_and_configuration(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job(latent_dim=3)
    drain(settings, engine)
    path = checkpoints_dir(settings, job) / "checkpoint_epoch_2.safetensors"
    state, config = load_checkpoint(path)
    assert (state.epoch, state.step) == (2, 0)
    assert config == job.training_config
    assert state.tensors["model.to_mu.weight"].shape == (3, 128)
    assert {name.rpartition(".")[2] for name in state.tensors if name.startswith("optimizer.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


@pytest.mark.parametrize("split", ["val", "test"])
def test_job_says_once_that_training_grids_are_in_another_split(
    settings: Settings,
    engine: Engine,
    submit_job: SubmitJob,
    write_npz: Callable[..., str],
    split: str,
) -> None:
    grids = np.random.default_rng(0).integers(0, 10, (60, 8, 8), dtype=np.uint8)
    splits = {"train": grids[:40], "val": grids[40:50], "test": grids[50:]}
    repeated = np.concatenate([grids[:3], grids[3:5].transpose(0, 2, 1), splits[split]])
    submitted = submit_job(dataset=write_npz(**splits | {split: repeated}))
    drain(settings, engine)
    queue.resume(engine, submitted.id, num_epochs=3)
    drain(settings, engine)
    job = read(engine, submitted)
    assert (job.status, job.epochs_completed) == (JobStatus.succeeded, 3)
    name = {"val": "validation", "test": "test"}[split]
    message = f"3 of 15 {name} grids also occur in training, 5 if turned or reflected"
    assert read_warnings(engine, job) == [message]
    assert message in JobFiles(settings.runs_dir, job.id).read_log()
    none = {"exact": 0, "by_orbit": 0}
    known = {"val": none, "test": none, split: {"exact": 3, "by_orbit": 5}}
    assert (job.dataset_summary or {})["overlap"] == known


def test_job_of_an_older_version_is_told_its_overlap_when_it_goes_on(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(generator=1, num_samples=8_000, epochs=1, batch_size=512)
    drain(settings, engine)
    with Session(engine) as session:
        job = session.get_one(Job, submitted.id)
        job.dataset_summary = {
            name: value for name, value in (job.dataset_summary or {}).items() if name != "overlap"
        }
        session.commit()
    queue.resume(engine, submitted.id, num_epochs=2)
    drain(settings, engine)
    warnings = read_warnings(engine, submitted)
    # Of both splits, once by the first attempt and once by the other, which could not know.
    assert len(warnings) == 4
    assert warnings[:2] == warnings[2:]
    assert re.match(r"\d+ of 800 validation grids also occur in training, \d+ if", warnings[0])


def test_job_is_told_of_colours_that_never_occur_and_of_weights_without_effect(
    settings: Settings, engine: Engine, submit_job: SubmitJob, write_npz: Callable[..., str]
) -> None:
    grids = np.random.default_rng(0).integers(0, 9, (4000, 16, 16), dtype=np.uint8)
    submitted = submit_job(
        dataset=write_npz(images=grids),
        num_samples=4000,
        batch_size=512,
        class_weighting="effective_number",
        epochs=1,
    )
    drain(settings, engine)
    absent, without_effect = read_warnings(engine, submitted)
    assert absent == "colours [9] never occur in the training split: weight 0"
    assert without_effect.startswith("class_weighting effective_number has no effect")


def test_handed_back_job_goes_on_where_it_was_and_ends_with_the_same_numbers(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    whole, interrupted = submit_job(epochs=12), submit_job(epochs=12)
    shutdown = threading.Event()
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=30, job_id=interrupted.id)
    assert claimed is not None
    stopper = threading.Thread(target=_stop_after_epoch, args=(engine, claimed, shutdown))
    stopper.start()
    run_job(claimed, settings=settings, engine=engine, shutdown=shutdown)
    stopper.join()
    assert read(engine, interrupted).status is JobStatus.queued
    drain(settings, engine)
    resumed = read(engine, interrupted)
    assert resumed.attempt == 2
    assert resumed.status is JobStatus.succeeded
    assert [numbers(row) for row in read_rows(engine, resumed)] == [
        numbers(row) for row in read_rows(engine, whole)
    ]


def _stop_after_epoch(engine: Engine, job: Job, shutdown: threading.Event) -> None:
    while read(engine, job).epochs_completed < 1:
        shutdown.wait(0.01)
    shutdown.set()


def test_cancelled_job_stops_and_keeps_what_it_has(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=1000, checkpoint_every=100)
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=30)
    assert claimed is not None
    runner = threading.Thread(
        target=run_job, args=(claimed,), kwargs={"settings": settings, "engine": engine}
    )
    runner.start()
    while read(engine, submitted).epochs_completed < 1:
        runner.join(0.02)
    queue.cancel(engine, submitted.id)
    runner.join(30)
    job = read(engine, submitted)
    assert job.status is JobStatus.cancelled
    assert len(read_rows(engine, job)) >= 1


@pytest.mark.parametrize("is_lost", [False, True])
def test_nothing_of_a_job_that_has_ended_takes_memory_from_the_next(
    settings: Settings,
    engine: Engine,
    submit_job: SubmitJob,
    is_lost: bool,
) -> None:
    # pytest keeps what is logged, with the error in it and all that the error passed through.
    logging.disable(logging.CRITICAL)
    submitted = submit_job(epochs=1000 if is_lost else 2)
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=30)
    assert claimed is not None
    runner = threading.Thread(
        target=run_job, args=(claimed,), kwargs={"settings": settings, "engine": engine}
    )
    gc.disable()  # it comes by when it likes
    try:
        runner.start()
        while is_lost and read(engine, submitted).epochs_completed < 1:
            runner.join(0.02)
        if is_lost:
            with engine.begin() as connection:
                connection.execute(text("UPDATE job SET worker_id = 'w2'"))
        runner.join(30)
        left = [thing for thing in gc.get_objects() if type(thing) is Trainer]
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)
    assert not runner.is_alive()
    assert left == []


def test_job_without_its_data_set_is_failed_as_the_users(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(dataset="missing")
    drain(settings, engine)
    job = read(engine, submitted)
    assert (job.status, job.error_code) == (JobStatus.failed, "bad_dataset")
    assert job.failure_kind is FailureKind.user
    assert "no data set 'missing'" in (job.error_message or "")


def test_infinite_loss_fails_the_job_with_its_epoch_and_step(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=3)
    drain(settings, engine)
    _make_weights_infinite(settings, engine, submitted)
    drain(settings, engine)
    job = read(engine, submitted)
    assert (job.status, job.error_code) == (JobStatus.failed, "non_finite_loss")
    assert job.failure_kind is FailureKind.numeric
    assert "epoch 3, step 1;" in (job.error_message or "")
    assert [row.epoch for row in read_rows(engine, job)] == [1, 2]


def _make_weights_infinite(settings: Settings, engine: Engine, submitted: Job) -> None:
    """Queue the job again after epoch 2, from a checkpoint with weights near the largest float."""
    path = checkpoints_dir(settings, submitted) / "checkpoint_epoch_2.safetensors"
    state, config = load_checkpoint(path)
    state.tensors["model.to_mu.weight"].fill_(torch.inf)
    path.unlink()  # best.safetensors may be another name of it
    save_checkpoint(path, state, config=config)
    with Session(engine) as session:
        job = session.get_one(Job, submitted.id)
        job.status, job.epochs_completed = JobStatus.queued, 2
        for row in session.exec(
            select(Artifact).where(Artifact.job_id == job.id, Artifact.epoch == 3)
        ):
            session.delete(row)
        session.delete(session.get_one(EpochMetrics, (job.id, 3)))
        row = session.exec(select(Artifact).where(Artifact.file_name == path.name)).one()
        row.sha256 = compute_sha256(path)
        session.commit()


def test_data_set_that_broke_after_it_was_accepted_is_named(
    settings: Settings, engine: Engine, submit_job: SubmitJob, write_npz: Callable[..., str]
) -> None:
    name = write_npz(images=np.zeros((40, 8, 8), dtype=np.uint8))
    submitted = submit_job(dataset=name)
    (settings.datasets_dir / f"{name}.npz").write_bytes(b"PK\x03\x04 broken")
    drain(settings, engine)
    job = read(engine, submitted)
    assert job.status is JobStatus.failed
    assert "mine.npz is no readable .npz file" in (job.error_message or "")


def test_picture_that_cannot_be_written_is_an_event_and_costs_no_training(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job()
    # A folder in the picture's place is an error for every user, even root.
    blocked = checkpoints_dir(settings, submitted) / "reconstructions_epoch_1.png"
    blocked.mkdir(parents=True)
    drain(settings, engine)
    job = read(engine, submitted)
    assert job.status is JobStatus.succeeded
    (warning,) = read_warnings(engine, job)
    assert "the picture of epoch 1" in warning
    epochs = {a.epoch for a in read_artifacts(engine, job) if a.kind == "reconstruction"}
    assert epochs == {2}


def test_lost_picture_is_drawn_again_from_its_checkpoint_when_the_job_ends(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=3)
    drain(settings, engine)
    before = {a.file_name: a.sha256 for a in read_artifacts(engine, submitted)}
    samples = [a.samples for a in read_artifacts(engine, submitted) if a.samples]
    folder = checkpoints_dir(settings, submitted)
    (folder / "reconstructions_epoch_1.png").unlink()
    (folder / "reconstructions_epoch_2.png").write_bytes(b"\x89PNG")
    queue.resume(engine, submitted.id, num_epochs=4)
    drain(settings, engine)
    assert read(engine, submitted).status is JobStatus.succeeded
    after = {a.file_name: a.sha256 for a in read_artifacts(engine, submitted)}
    assert after.keys() - before.keys() == {
        "checkpoint_epoch_4.safetensors",
        "reconstructions_epoch_4.png",
    }
    for artifact in read_artifacts(engine, submitted):
        assert compute_sha256(folder / artifact.file_name) == artifact.sha256
    again = {a.epoch: a.samples for a in read_artifacts(engine, submitted) if a.samples}
    for epoch, old in enumerate(samples, start=1):
        new = again[epoch]
        assert new is not None
        for ours, theirs in zip(new, old or [], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_lost_picture_whose_checkpoint_is_gone_is_an_event(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=3)
    drain(settings, engine)
    folder = checkpoints_dir(settings, submitted)
    (folder / "reconstructions_epoch_1.png").unlink()
    (folder / "checkpoint_epoch_1.safetensors").unlink()
    queue.resume(engine, submitted.id, num_epochs=4)
    drain(settings, engine)
    assert read(engine, submitted).status is JobStatus.succeeded
    lost = [message for message in read_warnings(engine, submitted) if "epoch 1 is lost" in message]
    assert len(lost) == 1
    assert "cannot be drawn again" in lost[0]


def test_corrupt_checkpoint_is_skipped_for_the_one_before(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=3)
    drain(settings, engine)
    whole = [numbers(row) for row in read_rows(engine, submitted)]
    newest = checkpoints_dir(settings, submitted) / "checkpoint_epoch_3.safetensors"
    save_file({"other": torch.zeros(1)}, newest)
    with Session(engine) as session:
        job = session.get_one(Job, submitted.id)
        job.status, job.epochs_completed = JobStatus.queued, 2
        session.commit()
    drain(settings, engine)
    assert "does not match its sha256" in JobFiles(settings.runs_dir, submitted.id).read_log()
    (warning,) = read_warnings(engine, submitted)
    assert warning == "checkpoint_epoch_3.safetensors does not match its sha256 and is skipped"
    assert read(engine, submitted).status is JobStatus.succeeded
    assert [numbers(row) for row in read_rows(engine, submitted)] == whole


def test_job_that_has_lost_all_its_checkpoints_starts_over_and_says_so(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=2)
    drain(settings, engine)
    whole = [numbers(row) for row in read_rows(engine, submitted)]
    for path in checkpoints_dir(settings, submitted).glob("*.safetensors"):
        path.unlink()
    queue.resume(engine, submitted.id, num_epochs=3)
    drain(settings, engine)
    job = read(engine, submitted)
    assert (job.status, job.progress) == (JobStatus.succeeded, 1.0)
    assert "none of the job's checkpoints can be loaded; it starts over" in read_warnings(
        engine, job
    )
    # Three planned epochs have another schedule than two.
    assert len(read_rows(engine, job)) == len(whole) + 1


def test_job_does_not_go_on_with_other_data_under_the_same_name(
    settings: Settings, engine: Engine, submit_job: SubmitJob, write_npz: Callable[..., str]
) -> None:
    name = write_npz(images=np.zeros((40, 8, 8), dtype=np.uint8))
    submitted = submit_job(dataset=name)
    drain(settings, engine)
    write_npz(images=np.ones((40, 8, 8), dtype=np.uint8))
    queue.resume(engine, submitted.id, num_epochs=3)
    drain(settings, engine)
    job = read(engine, submitted)
    assert (job.status, job.error_code) == (JobStatus.failed, "bad_dataset")
    assert "is not the one that this job began with" in (job.error_message or "")
    assert job.epochs_completed == 2
    write_npz(images=np.zeros((40, 8, 8), dtype=np.uint8))
    queue.resume(engine, submitted.id)
    drain(settings, engine)
    assert read(engine, submitted).epochs_completed == 3


def test_job_whose_best_checkpoint_broke_is_measured_with_the_next_best(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job(epochs=2, checkpoint_every=1)
    drain(settings, engine)
    with Session(engine) as session:
        # No later epoch is better than this.
        job = session.get_one(Job, submitted.id)
        job.best_epoch, job.best_val_recon_loss = 1, -1.0
        session.get_one(EpochMetrics, (submitted.id, 1)).val_recon_loss = -1.0
        session.commit()
    (checkpoints_dir(settings, submitted) / "checkpoint_epoch_1.safetensors").write_bytes(b"")
    queue.resume(engine, submitted.id, num_epochs=3)
    drain(settings, engine)
    job = read(engine, submitted)
    assert job.status is JobStatus.succeeded
    assert job.test_metrics is not None
    *_, warning = read_warnings(engine, job)
    assert re.search(r"the best checkpoint cannot be loaded; epoch [23], next best", warning)


def test_tracker_that_fails_is_an_event_and_costs_no_training(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job()
    # wandb is an optional package, and not installed for the tests.
    drain(settings.model_copy(update={"wandb_project": "study"}), engine)
    assert read(engine, submitted).status is JobStatus.succeeded
    (warning,) = read_warnings(engine, submitted)
    assert "No module named 'wandb'" in warning


def test_too_little_memory_is_its_own_kind_of_failure(submit_job: SubmitJob) -> None:
    with pytest.raises(RuntimeError) as of_the_processor:
        torch.empty(2**55)
    of_the_device = [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ]
    for error in [of_the_processor.value, MemoryError(), *of_the_device]:
        failure = describe_failure(error, job=submit_job())
        assert (failure.code, failure.kind) == ("out_of_memory", FailureKind.oom)
        assert "batch_size 32" in failure.message


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_failure_of_a_library_of_the_device_is_one_of_the_device(
    submit_job: SubmitJob, message: str
) -> None:
    failure = describe_failure(RuntimeError(message), job=submit_job())
    assert (failure.code, failure.kind) == ("device_failed", FailureKind.infrastructure)


def test_unforeseen_error_is_named_and_may_be_tried_again(submit_job: SubmitJob) -> None:
    failure = describe_failure(ZeroDivisionError("by zero"), job=submit_job())
    assert failure.kind is FailureKind.infrastructure
    assert failure.message == "ZeroDivisionError: by zero; the job's log has the traceback"
