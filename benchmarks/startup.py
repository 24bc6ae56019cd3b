"""How long the parts take to start: `losslab --help`, the server, and a worker's first step.

Each is started anew as a process, several times in turn. The corpus of the worker's job is on disk
already, as after a first job. Prints a table and writes `results/startup.json`:

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine

from benchmarks.machine import REPOSITORY, describe_machine, write_results
from server import job_queue
from server.database import open_database
from server.models import Option
from server.schemas import resolve_config
from server.settings import Settings

TARGETS = {"losslab --help": 0.3, "server ready": 1.5, "worker to first step": 4.0}
PACKAGES = ("losslab", "torch", "fastapi", "sqlmodel")
PAUSE_SECONDS = 0.005
GIVE_UP_SECONDS = 60.0
LOSSLAB = (sys.executable, "-c", "from server.cli import app; app()")
#: The worker as `python -m worker` runs it, until its first step is done.
FIRST_STEP = """
import os
from worker import heartbeat, main
heartbeat.Heartbeat.set_progress = lambda self, progress: os._exit(0)
main.main()
"""


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
    """Until it answers that it is healthy."""
    port = find_free_port()
    started = time.perf_counter()
    command = [*LOSSLAB, "serve", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/healthz", process=process)
        return time.perf_counter() - started
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
    """From the start of the process, with a job of 80,000 grids waiting for it."""
    config = resolve_config(Option.b, quick_test=True, overrides={})
    job = job_queue.submit(engine, option=Option.b, config=config, quick_test=True)
    started = time.perf_counter()
    command = [sys.executable, "-c", FIRST_STEP, "--job", job.id]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
