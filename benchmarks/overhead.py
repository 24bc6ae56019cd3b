"""The overhead of a job beyond its training: pictures, checkpoints, hashes and the database.

Alternately runs a job of five epochs with 2,000 grids each, with a checkpoint and a picture after
every epoch, and its bare trainer, which writes nothing; the difference is the overhead. Prints a
table and writes `results/overhead.json`. It takes about a minute on two cores:

    python -m benchmarks.overhead
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine

from benchmarks.machine import describe_machine, write_results
from server.database.engine import open_database, write_transaction
from server.environment.cores import count_cores
from server.files.artifacts import JobFiles
from server.jobs import queue
from server.jobs.submission import new_job, submit_job
from server.models.configuration import TrainingConfig, resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import ArtifactKind, Job
from server.settings import Settings
from worker import runner
from worker.checkpoints import save_checkpoint
from worker.data import Dataset, draw_reconstruction_batches, load_dataset
from worker.device import choose_device, keep_freed_memory
from worker.pictures import reconstruct, render_reconstructions
from worker.recorder import EpochRecorder
from worker.redrawing import NUM_RECONSTRUCTIONS
from worker.training import EpochResult, Trainer

NUM_GRIDS = 2_000
WORKER_ID = "benchmark"
TARGETS = {"picture": 150.0, "checkpoint": 50.0}
PACKAGES = ("losslab", "torch", "numpy", "pillow")


class Watch:
    """Measures the time of functions inside a job by replacing them with timed versions."""

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self.handing_over_seconds = 0.0
        self.recording_cpu_seconds: list[float] = []  # one per epoch
        record_epochs, record = runner._record_epochs, EpochRecorder.record
        submit = EpochRecorder._submit

        def timed_record_epochs(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            record_epochs(*args, **kwargs)
            self.total_seconds = time.perf_counter() - started

        def timed_record(recorder: EpochRecorder, result: EpochResult, trainer: Trainer) -> None:
            started = time.perf_counter()
            record(recorder, result, trainer)
            self.handing_over_seconds += time.perf_counter() - started

        def timed_submit(recorder: EpochRecorder, store: Callable[[], None]) -> None:
            def timed_store() -> None:
                started = time.thread_time()
                store()
                self.recording_cpu_seconds.append(time.thread_time() - started)

            submit(recorder, timed_store)

        runner._record_epochs = timed_record_epochs
        EpochRecorder.record = timed_record  # type: ignore[method-assign]
        EpochRecorder._submit = timed_submit  # type: ignore[method-assign]


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    keep_freed_memory()
    torch.set_num_threads(count_cores())
    logging.getLogger("worker").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as data_dir:
        settings = Settings(data_dir=Path(data_dir), database_url="")
        config = resolve_quick_test()
        dataset = load_dataset(
            config, datasets_dir=settings.datasets_dir, cache_dir=settings.cache_dir
        )
        parts = measure_parts(config, dataset, settings=settings, repeats=arguments.repeats)
        shares = measure_shares(config, dataset, settings=settings, rounds=arguments.rounds)
    print(format_table(parts, shares))
    if not arguments.no_write:
        write_results("overhead", machine | {"medians_ms": parts, "shares": shares})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def resolve_quick_test() -> TrainingConfig:
    # 8 of 10 grids are for training.
    overrides = {"num_samples": NUM_GRIDS * 10 // 8}
    return resolve_config(OPTIONS[BuiltInOption.b].config, quick_test=True, overrides=overrides)


def measure_parts(
    config: TrainingConfig, dataset: Dataset, *, settings: Settings, repeats: int
) -> dict[str, float]:
    """Medians in milliseconds. The first two block training, the others a separate thread."""
    trainer = Trainer(config, dataset, device=choose_device())
    next(trainer.epochs())
    files = JobFiles(settings.runs_dir, "0" * 12)
    files.create()
    state, samples = trainer.copy_state(), draw_samples(config, dataset)
    pairs = reconstruct_samples(trainer, samples)

    def write_checkpoint() -> None:
        files.write(
            ArtifactKind.checkpoint,
            epoch=1,
            write_to=lambda path: save_checkpoint(path, state, config=config),
        ).discard()

    def write_picture() -> None:
        files.write(
            ArtifactKind.reconstruction,
            epoch=1,
            write_to=lambda path: render_reconstructions(pairs, path, title="benchmark"),
        ).discard()

    work: dict[str, Callable[[], object]] = {
        "copy of the state": trainer.copy_state,
        "reconstructions": lambda: reconstruct_samples(trainer, samples),
        "checkpoint": write_checkpoint,
        "picture": write_picture,
    }
    return {name: measure(each, repeats=repeats) for name, each in work.items()}


def draw_samples(config: TrainingConfig, dataset: Dataset) -> list[torch.Tensor]:
    return draw_reconstruction_batches(
        dataset.train,
        num_samples=NUM_RECONSTRUCTIONS,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def reconstruct_samples(trainer: Trainer, samples: list[torch.Tensor]) -> list[Any]:
    return reconstruct(
        trainer.model, samples, device=trainer.device, num_samples=NUM_RECONSTRUCTIONS
    )


def measure(work: Callable[[], object], *, repeats: int) -> float:
    """Median of several runs in milliseconds."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds) * 1e3, 1)


def measure_shares(
    config: TrainingConfig, dataset: Dataset, *, settings: Settings, rounds: int
) -> dict[str, Any]:
    """The shares of a job's time that are not training, until everything is on disk."""
    engine, watch = open_database(settings), Watch()
    bare, whole, held_up = [], [], []
    for number in range(rounds + 1):
        bare_seconds = train_bare(config, dataset)
        watch.handing_over_seconds = 0.0
        run_whole_job(engine, settings=settings)
        if number:  # the first round warms up
            bare.append(bare_seconds)
            whole.append(watch.total_seconds)
            held_up.append(watch.handing_over_seconds / watch.total_seconds)
    engine.dispose()
    recording = statistics.median(watch.recording_cpu_seconds)
    return {
        "recording_cpu_ms_an_epoch": round(recording * 1e3, 1),
        "training_thread_held_up": round(statistics.median(held_up), 4),
        "longer_than_bare_trainer": round(
            statistics.median(w / b - 1 for w, b in zip(whole, bare, strict=True)), 4
        ),
        "bare_seconds": [round(seconds, 3) for seconds in bare],
        "job_seconds": [round(seconds, 3) for seconds in whole],
    }


def train_bare(config: TrainingConfig, dataset: Dataset) -> float:
    trainer = Trainer(config, dataset, device=choose_device())
    started = time.perf_counter()
    for _ in trainer.epochs():
        pass
    return time.perf_counter() - started


def run_whole_job(engine: Engine, *, settings: Settings) -> None:
    with write_transaction(engine) as session:
        wanted = new_job(
            resolve_quick_test(), option=BuiltInOption.b, quick_test=True, name="benchmark"
        )
        submitted = submit_job(session, wanted)
    job: Job | None = queue.claim(engine, worker_id=WORKER_ID, lease_seconds=settings.lease_seconds)
    assert job is not None
    assert job.id == submitted.id
    runner.run_job(job, settings=settings, engine=engine)


def format_table(parts: dict[str, float], shares: dict[str, Any]) -> str:
    lines = ["| | measured | target |", "| --- | --- | --- |"]
    for name, milliseconds in parts.items():
        target = f"{TARGETS[name]:g} ms" if name in TARGETS else ""
        lines.append(f"| {name} | {milliseconds} ms | {target} |")
    lines.append(
        "| processor time of the recording thread per epoch "
        f"| {shares['recording_cpu_ms_an_epoch']:.0f} ms | |"
    )
    lines.append(
        f"| training thread blocked | {shares['training_thread_held_up']:.1%} of an epoch | 3 % |"
    )
    lines.append(
        f"| job compared with bare trainer | {shares['longer_than_bare_trainer']:+.1%} | 3 % |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
