"""The server under many clients while a job trains: how long they wait, and what it costs the job.

200 clients beside a training for a minute: 120 poll `GET /jobs/{id}` and 40 `GET /jobs`, each once
in two seconds, as the dashboard does (`losslab submit --wait` asks twice a second); 40 hold a live
stream of the job's events. They come in the course of two seconds. That is 80 requests a second,
which the default LOSSLAB_RATE_LIMIT still lets through from one address. The clients run in a
process of their own on the same cores, so what they cost counts against the training, too. The
job's throughput is that of the epochs within the minute, beside that of the minutes before and
after, in which nobody asks anything.

The worker takes half of the cores (LOSSLAB_NUM_WORKERS=2), as on a machine that also serves;
`--num-workers 1` lets it have all of them. Prints a table and writes `results/load.json`. About
four minutes on two cores:

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
#: Epochs of a second or two, and more of them than the minutes need.
JOB = {"option": "b", "num_samples": 4000, "epochs": 1000, "checkpoint_every": 50}
NUM_POLLING, NUM_LISTING, NUM_STREAMING = 120, 40, 40
NUM_ASKING = NUM_POLLING + NUM_LISTING
PACE_SECONDS = 2.0
NUM_OTHER_JOBS = 50
LONGEST_WAIT_SECONDS = 120.0
MAX_READ_MS_99TH = 250.0
MAX_SLOWDOWN = 0.15

Row = dict[str, Any]
_processes = multiprocessing.get_context("spawn")


@dataclass
class Tally:
    """What the clients saw."""

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
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, and before and after")
    parser.add_argument("--num-workers", type=int, default=2, help="that would share the cores")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def measure(data_dir: Path, *, arguments: argparse.Namespace) -> Row:
    seconds = arguments.seconds
    with running(data_dir, num_workers=arguments.num_workers) as url:
        job_id = prepare(url)
        before = wait_while_idle(seconds)
        loaded, tally = ask_for(seconds, url=url, job_id=job_id)
        # What the load left behind shall not count as idle.
        time.sleep(2 * PACE_SECONDS)
        after = wait_while_idle(seconds)
        epochs = httpx.get(f"{url}/jobs/{job_id}/metrics").json()["data"]
    speeds = [find_speed(epochs, span=span) for span in (before, loaded, after)]
    return describe(tally, speeds=speeds, seconds=seconds)


@contextmanager
def running(data_dir: Path, *, num_workers: int) -> Iterator[str]:
    """A server and a worker, each a process; the URL."""
    port = 18700 + os.getpid() % 1000
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(data_dir),
        "LOSSLAB_NUM_WORKERS": str(num_workers),
    }
    processes = [
        subprocess.Popen([LOSSLAB, *command], env=environment, stdout=subprocess.DEVNULL)
        for command in (["serve", "--port", str(port)], ["worker"])
    ]
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_answering(url))
        yield url
    finally:
        for process in processes[::-1]:
            process.terminate()
            process.wait()


def prepare(url: str) -> str:
    """A job that trains among many that ended; its id."""
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


def ask_for(seconds: float, *, url: str, job_id: str) -> tuple[tuple[datetime, datetime], Tally]:
    """Let all clients ask for so long; when they did, and what they saw."""
    receiver, sender = _processes.Pipe(duplex=False)
    clients = _processes.Process(target=run_clients, args=(seconds, url, job_id, sender))
    clients.start()
    begun: datetime = receiver.recv()
    tally: Tally = receiver.recv()
    clients.join()
    return (begun, datetime.fromtimestamp(begun.timestamp() + seconds, UTC)), tally


def run_clients(seconds: float, url: str, job_id: str, sender: Any) -> None:
    sender.send(datetime.now(UTC))
    sender.send(asyncio.run(ask_together(seconds, url=url, job_id=job_id)))


async def ask_together(seconds: float, *, url: str, job_id: str) -> Tally:
    tally = Tally()
    until = time.monotonic() + seconds
    polls = [(f"/jobs/{job_id}", tally.read_ms)] * NUM_POLLING
    lists = [("/jobs?limit=20", tally.list_ms)] * NUM_LISTING
    asking = [
        poll(url, path, waits=waits, tally=tally, until=until, offset=index / NUM_ASKING)
        for index, (path, waits) in enumerate([*polls, *lists])
    ]
    streams = [
        stream(url, job_id, tally=tally, until=until, offset=index / NUM_STREAMING)
        for index in range(NUM_STREAMING)
    ]
    await asyncio.gather(*asking, *streams)
    return tally


def open_client(url: str) -> httpx.AsyncClient:
    """One for each, as they would be different programs: httpx looks through all connections of
    a client at every request. Without certificates, which nobody asks for here."""
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
    """One client, which asks again and again; clients begin at different moments."""
    await asyncio.sleep(offset * PACE_SECONDS)
    async with open_client(url) as client:
        while time.monotonic() < until:
            asked = time.perf_counter()
            try:
                answer = await client.get(path)
                answer.raise_for_status()
                waits.append(1000 * (time.perf_counter() - asked))
            except httpx.HTTPError as error:
                tally.errors.append(repr(error))
            await asyncio.sleep(max(0.0, PACE_SECONDS - (time.perf_counter() - asked)))


async def stream(url: str, job_id: str, *, tally: Tally, until: float, offset: float) -> None:
    await asyncio.sleep(offset * PACE_SECONDS)
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


# -- what came of it


def find_speed(epochs: list[Row], *, span: tuple[datetime, datetime]) -> float:
    """Grids a second over the epochs that lie within the span."""
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
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def is_answering(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("waited in vain")
        time.sleep(0.1)


def format_table(row: Row) -> str:
    read_ms, slowdown = row["read_ms_99th"], row["slowdown"]
    lines = [
        f"{row['num_clients']} clients, {row['requests_per_second']:.0f} requests a second, "
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
