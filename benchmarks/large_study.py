"""The largest study, 20 arms of 100 seeds, from its request to its deletion; and what workers save.

Sends one request at a time to `losslab serve`, on SQLite and PostgreSQL. Then trains a small study
with one worker and with two, in turn, and compares the times from the request to the last seed.
Prints a table and writes `results/large_study.json`; takes about ten minutes on two cores:

    python -m benchmarks.large_study
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine, write_results
from benchmarks.store import open_postgres, serve
from server.settings import Settings

PACKAGES = ("losslab", "sqlalchemy", "torch")
GRID = {"beta": [number / 10 for number in range(20)]}
LARGEST = {"options": ["b"], "grid": GRID, "num_seeds": 100}
#: Four jobs, each long enough that its epochs take most of its time, as those of a quick test do.
SMALL = {"options": ["a", "b"], "num_seeds": 2, "config": {"epochs": 2, "num_samples": 20_000}}
#: Seconds that each request may take.
TARGET_SECONDS = 2.0
#: How many times as long a study takes with one worker as with two.
TARGET_RATIO = 1.4
LONGEST_SECONDS = 600.0


def main() -> None:
    arguments = parse_arguments()
    results = describe_machine(PACKAGES) | {"rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as data_dir, open_postgres("") as url:
        for number, each in enumerate(("", *filter(None, [url]))):
            settings = Settings(data_dir=Path(data_dir) / str(number), database_url=each)
            name = "postgresql" if each else "sqlite"
            results[name] = measure_requests(settings, rounds=arguments.rounds)
            print(
                f"{name}, seconds for 2,000 jobs: {results[name]}; the target is {TARGET_SECONDS:g}"
            )
        if not arguments.no_workers:
            settings = Settings(data_dir=Path(data_dir) / "workers", database_url="")
            results["workers"] = compare_workers(settings, rounds=arguments.rounds)
            print(f"a small study: {results['workers']}; the target is {TARGET_RATIO:g}")
    if not arguments.no_write:
        write_results("large_study", results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--no-workers", action="store_true", help="requests only, on a machine that is not idle"
    )
    parser.add_argument("--no-write", action="store_true", help="print the results only")
    return parser.parse_args()


def measure_requests(settings: Settings, *, rounds: int) -> dict[str, float]:
    """The median seconds of each request."""
    found: dict[str, list[float]] = {}
    with serve(settings) as client:
        for number in range(rounds + 1):
            seconds = time_life(client)
            if number:  # the first round warms up
                for name, value in seconds.items():
                    found.setdefault(name, []).append(value)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def time_life(client: httpx.Client) -> dict[str, float]:
    """The seconds of each request in the life of the largest study."""
    seconds: dict[str, float] = {}

    def take(name: str, ask: Callable[[], httpx.Response]) -> Any:
        begin = time.perf_counter()
        answer = ask().raise_for_status()
        seconds[name] = time.perf_counter() - begin
        return answer.json()

    path = f"/studies/{take('post', lambda: client.post('/studies', json=LARGEST))['id']}"
    take("read", lambda: client.get(path))
    for name in ("pause", "resume", "cancel"):
        take(name, lambda name=name: client.post(f"{path}/{name}"))
    take("delete", lambda: client.delete(path))
    return seconds


def compare_workers(settings: Settings, *, rounds: int) -> dict[str, float]:
    found: dict[int, list[float]] = {1: [], 2: []}
    with serve(settings) as client:
        for _ in range(rounds):
            for number, seconds in found.items():
                with start_workers(settings, client, number=number):
                    seconds.append(time_study(client))
    medians = {f"workers_{n}": round(statistics.median(each), 2) for n, each in found.items()}
    ratios = [one / two for one, two in zip(found[1], found[2], strict=True)]
    return medians | {"ratio": round(statistics.median(ratios), 2)}


@contextmanager
def start_workers(settings: Settings, client: httpx.Client, *, number: int) -> Iterator[None]:
    """So many worker processes that wait for jobs."""
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_NUM_WORKERS": str(number),
        "LOSSLAB_POLL_SECONDS": "0.1",
    }
    with ExitStack() as stack:
        for _ in range(number):
            command = [sys.executable, "-m", "worker"]
            process = subprocess.Popen(
                command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        wait_until(lambda: count_idle(client) >= number)
        yield


def count_idle(client: httpx.Client) -> int:
    workers = client.get("/workers").raise_for_status().json()["data"]
    return sum(worker["state"] == "idle" for worker in workers)


def time_study(client: httpx.Client) -> float:
    """Seconds from the request to the last seed."""
    begin = time.perf_counter()
    study = client.post("/studies", json=SMALL).raise_for_status().json()
    wait_until(lambda: client.get(f"/studies/{study['id']}").json()["status"] == "succeeded")
    return time.perf_counter() - begin


def wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not is_reached():
        if time.monotonic() > deadline:
            raise SystemExit("a study or a worker took too long")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
