"""Start times of `losslab --help`, the server, a worker and a posted job.

Each is started as a new process, several times in turn. The corpus of the worker's job is already
on disk, as after a first job; generating it is measured separately. Prints a table and writes
`results/startup.json`:

    python -m benchmarks.startup
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine

from benchmarks.machine import REPOSITORY, describe_machine, write_results
from server.database.engine import open_database, write_transaction
from server.jobs.submission import new_job, submit_job
from server.models.configuration import TrainingConfig, resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.settings import Settings
from worker.atomic import generate_atomic
from worker.data import load_dataset

TARGETS = {
    "losslab --help": 0.3,
    "server ready": 1.5,
    "worker to first step": 4.0,
    "POST to first step of an idle worker": 3.0,
    "100,000 grids generated": 5.0,
    "the same from the disk": 1.0,
}
PACKAGES = ("losslab", "torch", "fastapi", "sqlmodel")
PAUSE_SECONDS = 0.005
GIVE_UP_SECONDS = 60.0
LOSSLAB = (sys.executable, "-c", "from server.cli.main import app; app()")
#: The worker as in `python -m worker`, until its first step is done; prints that time last.
FIRST_STEP = """
import gc, os, time
gc.disable()
from worker import heartbeat, main
gc.freeze()
gc.enable()
def end(self, progress):
    print(time.time(), flush=True)
    os._exit(0)
heartbeat.Heartbeat.set_progress = end
main.main()
"""
IS_IDLE = "waits for jobs"


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    with tempfile.TemporaryDirectory() as data_dir:
        settings = Settings(data_dir=Path(data_dir), database_url="")
        engine = open_database(settings)
        rows = measure_all(engine, settings=settings, rounds=arguments.rounds)
        engine.dispose()
    print("| | median | target |\n| --- | --- | --- |")
    for name, seconds in rows.items():
        print(f"| {name} | {statistics.median(seconds):.2f} s | {TARGETS[name]} s |")
    if not arguments.no_write:
        medians = {name: round(statistics.median(found), 3) for name, found in rows.items()}
        write_results("startup", machine | {"medians_s": medians, "seconds": rows})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def measure_all(engine: Engine, *, settings: Settings, rounds: int) -> dict[str, list[float]]:
    environment = os.environ | {"LOSSLAB_DATA_DIR": str(settings.data_dir)}
    work: dict[str, Callable[[], float]] = {
        "losslab --help": lambda: time_help(environment),
        "server ready": lambda: time_server(environment),
        "worker to first step": lambda: time_first_step(engine, environment=environment),
        "POST to first step of an idle worker": lambda: time_post(environment),
        "100,000 grids generated": time_generation,
        "the same from the disk": lambda: time_loading(settings),
    }
    for each in work.values():  # fills the caches
        each()
    rows: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, each in work.items():
            rows[name].append(round(each(), 3))
    return rows


def time_help(environment: dict[str, str]) -> float:
    started = time.perf_counter()
    command = [*LOSSLAB, "--help"]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - started


def time_server(environment: dict[str, str]) -> float:
    """Seconds until `/healthz` answers."""
    started = time.perf_counter()
    with serve(environment):
        return time.perf_counter() - started


@contextmanager
def serve(environment: dict[str, str]) -> Iterator[str]:
    """Run a server; yields its URL once it answers."""
    port = find_free_port()
    command = [*LOSSLAB, "serve", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/healthz", process=process)
        yield url
    finally:
        process.terminate()
        process.wait()


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def wait_for(url: str, *, process: subprocess.Popen[Any]) -> None:
    give_up_at = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(PAUSE_SECONDS)
    raise SystemExit("the server did not start")


def time_first_step(engine: Engine, *, environment: dict[str, str]) -> float:
    """Seconds from the start of the process, with a queued job of 80,000 training grids."""
    config = resolve_config(OPTIONS[BuiltInOption.b].config, quick_test=True, overrides={})
    with write_transaction(engine) as session:
        job = submit_job(session, new_job(config, option=BuiltInOption.b, quick_test=True))
    started = time.perf_counter()
    command = [sys.executable, "-c", FIRST_STEP, "--job", job.id]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - started


def time_post(environment: dict[str, str]) -> float:
    """Seconds from the request to the end of the first step, with an idle worker."""
    command = [sys.executable, "-c", FIRST_STEP]
    with (
        serve(environment) as url,
        subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        ) as worker,
    ):
        assert worker.stdout is not None
        while IS_IDLE not in worker.stdout.readline():
            assert worker.poll() is None, "the worker did not start"
        posted_at = time.time()
        httpx.post(f"{url}/jobs", json={"option": "b", "quick_test": True}).raise_for_status()
        *_, stepped_at = worker.stdout.read().splitlines()
        return float(stepped_at) - posted_at


def time_generation() -> float:
    started = time.perf_counter()
    generate_atomic(num_grids=100_000, seed=0)
    return time.perf_counter() - started


def time_loading(settings: Settings) -> float:
    config = TrainingConfig()
    started = time.perf_counter()
    load_dataset(config, datasets_dir=settings.datasets_dir, cache_dir=settings.cache_dir)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
