"""The server with many clients while a job trains: response times and the job's slowdown.

200 clients send requests for a minute during a training: 120 poll `GET /jobs/{id}` and 40 poll
`GET /jobs`, each every two seconds, as the dashboard does (`losslab submit --wait` polls twice per
second); 40 hold a live stream of the job's events. Their starts are spread over two seconds. These
80 requests per second are just below the default LOSSLAB_RATE_LIMIT of one address. The clients run
in a separate process on the same cores, so their cost also slows the training. The job's throughput
in this minute is compared with the minutes before and after, without requests.

The worker takes half of the cores (LOSSLAB_NUM_WORKERS=2), as on a machine that also runs the
server; `--num-workers 1` gives it all cores. Prints a table and writes `results/load.json`. It
takes about four minutes on two cores:

    python -m benchmarks.load
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parent.parent
RESULTS_PATH = Path(__file__).parent / "results" / "load.json"
LOSSLAB = str(Path(sys.executable).with_name("losslab"))
#: Epochs of one or two seconds each, more than the measurement needs.
JOB = {"option": "b", "num_samples": 4000, "epochs": 1000, "checkpoint_every": 50}
NUM_POLLING, NUM_LISTING, NUM_STREAMING = 120, 40, 40
NUM_POLLERS = NUM_POLLING + NUM_LISTING
INTERVAL_SECONDS = 2.0
NUM_OTHER_JOBS = 50
LONGEST_WAIT_SECONDS = 120.0
MAX_READ_MS_99TH = 250.0
MAX_SLOWDOWN = 0.15

Row = dict[str, Any]
_processes = multiprocessing.get_context("spawn")


@dataclass
class Tally:
    """The clients' measurements."""

    read_ms: list[float] = field(default_factory=list)
    list_ms: list[float] = field(default_factory=list)
    num_events: int = 0
    errors: list[str] = field(default_factory=list)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        row = measure(Path(directory), arguments=arguments)
    print(format_table(row))
    if not arguments.no_write:
        write_results(row, arguments=arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, before and after")
    parser.add_argument("--num-workers", type=int, default=2, help="as if they shared the cores")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def measure(data_dir: Path, *, arguments: argparse.Namespace) -> Row:
    seconds = arguments.seconds
    with running(data_dir, num_workers=arguments.num_workers) as url:
        job_id = prepare(url)
        before = wait_while_idle(seconds)
        loaded, tally = run_load(seconds, url=url, job_id=job_id)
        # The rest of the load should not count as idle time.
        time.sleep(2 * INTERVAL_SECONDS)
        after = wait_while_idle(seconds)
        epochs = httpx.get(f"{url}/jobs/{job_id}/metrics").json()["data"]
    speeds = [find_speed(epochs, span=span) for span in (before, loaded, after)]
    return describe(tally, speeds=speeds, seconds=seconds)


@contextmanager
def running(data_dir: Path, *, num_workers: int) -> Iterator[str]:
    """Run a server and a worker process; yields the URL."""
    with start(data_dir, "serve", "worker", LOSSLAB_NUM_WORKERS=str(num_workers)) as (url, _):
        yield url


@contextmanager
def start(data_dir: Path, *commands: str, **variables: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Run the server and other commands; yields the server's URL and the process ids."""
    port = str(18700 + os.getpid() % 1000)
    environment = os.environ | variables | {"LOSSLAB_DATA_DIR": str(data_dir), "LOSSLAB_PORT": port}
    processes = {
        command: subprocess.Popen([LOSSLAB, command], env=environment, stdout=subprocess.DEVNULL)
        for command in commands
    }
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_answering(url))
        yield url, {command: process.pid for command, process in processes.items()}
    finally:
        for process in reversed(processes.values()):
            process.terminate()
            process.wait()


def prepare(url: str) -> str:
    """Post and cancel other jobs, then start one; returns its id once it trains."""
    with httpx.Client(base_url=url) as client:
        for _ in range(NUM_OTHER_JOBS):
            other = client.post("/jobs", json={"option": "a", "priority": -1}).json()["id"]
            client.post(f"/jobs/{other}/cancel").raise_for_status()
        job_id: str = client.post("/jobs", json=JOB).raise_for_status().json()["id"]
        wait_for(lambda: client.get(f"/jobs/{job_id}").json()["epochs_completed"] >= 3)
    return job_id


def wait_while_idle(seconds: float) -> tuple[datetime, datetime]:
    begun = datetime.now(UTC)
    time.sleep(seconds)
    return begun, datetime.now(UTC)


# -- the clients


def run_load(seconds: float, *, url: str, job_id: str) -> tuple[tuple[datetime, datetime], Tally]:
    """Run all clients for `seconds`; returns the time span and the measurements."""
    receiver, sender = _processes.Pipe(duplex=False)
    clients = _processes.Process(target=run_clients, args=(seconds, url, job_id, sender))
    clients.start()
    begun: datetime = receiver.recv()
    tally: Tally = receiver.recv()
    clients.join()
    return (begun, datetime.fromtimestamp(begun.timestamp() + seconds, UTC)), tally


def run_clients(seconds: float, url: str, job_id: str, sender: Any) -> None:
    sender.send(datetime.now(UTC))
    sender.send(asyncio.run(run_all_clients(seconds, url=url, job_id=job_id)))


async def run_all_clients(seconds: float, *, url: str, job_id: str) -> Tally:
    tally = Tally()
    until = time.monotonic() + seconds
    polls = [(f"/jobs/{job_id}", tally.read_ms)] * NUM_POLLING
    lists = [("/jobs?limit=20", tally.list_ms)] * NUM_LISTING
    polling = [
        poll(url, path, waits=waits, tally=tally, until=until, offset=index / NUM_POLLERS)
        for index, (path, waits) in enumerate([*polls, *lists])
    ]
    streams = [
        stream(url, job_id, tally=tally, until=until, offset=index / NUM_STREAMING)
        for index in range(NUM_STREAMING)
    ]
    await asyncio.gather(*polling, *streams)
    return tally


def open_client(url: str) -> httpx.AsyncClient:
    """A separate client per simulated program: httpx searches all connections of a client at every
    request. It loads no certificates, since there is no TLS here."""
    return httpx.AsyncClient(base_url=url, timeout=30.0, verify=False)


async def poll(
    url: str,
    path: str,
    *,
    waits: list[float],
    tally: Tally,
    until: float,
    offset: float,
) -> None:
    """One client that polls a path, starting after a share `offset` of the interval."""
    await asyncio.sleep(offset * INTERVAL_SECONDS)
    async with open_client(url) as client:
        while time.monotonic() < until:
            sent_at = time.perf_counter()
            try:
                answer = await client.get(path)
                answer.raise_for_status()
                waits.append(1000 * (time.perf_counter() - sent_at))
            except httpx.HTTPError as error:
                tally.errors.append(repr(error))
            await asyncio.sleep(max(0.0, INTERVAL_SECONDS - (time.perf_counter() - sent_at)))


async def stream(url: str, job_id: str, *, tally: Tally, until: float, offset: float) -> None:
    await asyncio.sleep(offset * INTERVAL_SECONDS)
    headers = {"Accept": "text/event-stream"}
    path = f"/jobs/{job_id}/events"
    try:
        async with (
            asyncio.timeout(until - time.monotonic()),
            open_client(url) as client,
            client.stream("GET", path, headers=headers) as answer,
        ):
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                tally.num_events += line.startswith("data:")
        tally.errors.append("a stream ended before its job did")
    except TimeoutError:
        pass
    except httpx.HTTPError as error:
        tally.errors.append(repr(error))


# -- results


def find_speed(epochs: list[Row], *, span: tuple[datetime, datetime]) -> float:
    """Grids per second over the epochs inside the time span."""
    seconds = grids = 0.0
    for epoch in epochs:
        ended = datetime.fromisoformat(epoch["recorded_at"]).timestamp()
        if span[0].timestamp() <= ended - epoch["seconds"] and ended <= span[1].timestamp():
            seconds += epoch["seconds"]
            grids += epoch["seconds"] * epoch["grids_per_second"]
    return grids / seconds


def describe(tally: Tally, *, speeds: list[float], seconds: float) -> Row:
    before, loaded, after = speeds
    idle = statistics.mean([before, after])
    num_requests = len(tally.read_ms) + len(tally.list_ms)
    return {
        "num_clients": NUM_POLLING + NUM_LISTING + NUM_STREAMING,
        "num_requests": num_requests,
        "requests_per_second": num_requests / seconds,
        "num_events": tally.num_events,
        "num_errors": len(tally.errors),
        "errors": sorted(set(tally.errors))[:10],
        "read_ms_median": statistics.median(tally.read_ms),
        "read_ms_99th": find_percentile(tally.read_ms, 0.99),
        "read_ms_max": max(tally.read_ms),
        "list_ms_median": statistics.median(tally.list_ms),
        "list_ms_99th": find_percentile(tally.list_ms, 0.99),
        "grids_per_second_before": before,
        "grids_per_second_loaded": loaded,
        "grids_per_second_after": after,
        "slowdown": 1 - loaded / idle,
    }


def find_percentile(values: list[float], share: float) -> float:
    """The smallest value that is not exceeded by at least this share of the values."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def is_answering(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/readyz")
        return answer.is_success or answer.status_code == 401  # a server that wants a token
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"no success after {LONGEST_WAIT_SECONDS:.0f} s")
        time.sleep(0.1)


def format_table(row: Row) -> str:
    read_ms, slowdown = row["read_ms_99th"], row["slowdown"]
    lines = [
        f"{row['num_clients']} clients, {row['requests_per_second']:.0f} requests per second, "
        f"{row['num_events']} events: {row['num_errors']} errors {row['errors'] or ''}",
        f"GET /jobs/{{id}}: median {row['read_ms_median']:.1f} ms, 99th percentile "
        f"{read_ms:.1f} ms ({compare(read_ms, MAX_READ_MS_99TH)} {MAX_READ_MS_99TH:.0f} ms)",
        f"GET /jobs: median {row['list_ms_median']:.1f} ms, 99th percentile "
        f"{row['list_ms_99th']:.1f} ms",
        f"training: {row['grids_per_second_before']:.0f} grids/s before, "
        f"{row['grids_per_second_loaded']:.0f} under load, {row['grids_per_second_after']:.0f} "
        f"after: {slowdown:.1%} slower ({compare(slowdown, MAX_SLOWDOWN)} "
        f"{MAX_SLOWDOWN:.0%})",
    ]
    return "\n".join(lines)


def compare(value: float, limit: float) -> str:
    return "meets" if value < limit else "MISSES"


def write_results(row: Row, *, arguments: argparse.Namespace) -> None:
    results = {
        "measured_at": f"{datetime.now(UTC):%Y-%m-%d}",
        "python": platform.python_version(),
        "num_cores": len(os.sched_getaffinity(0)),
        "arguments": vars(arguments),
        "row": row,
    }
    RESULTS_PATH.parent.mkdir(exist_ok=True)
    RESULTS_PATH.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
