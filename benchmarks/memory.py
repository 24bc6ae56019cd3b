"""Memory over a long life: a server that takes ten thousand jobs, a worker that trains two hundred,
and a server that takes an upload of the largest allowed size.

Growth is what is resident after the last quarter of the jobs, less what was after the first one:
caches and pools fill in the first. Prints a table and writes `results/memory.json`; about ten
minutes on two cores:

    python -m benchmarks.memory
"""

import argparse
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.load import start, wait_for
from benchmarks.machine import describe_machine, write_results

PACKAGES = ("losslab", "torch", "fastapi", "sqlalchemy")
TINY = {"option": "b", "num_samples": 100, "epochs": 1, "batch_size": 16}
NUM_POINTS = 20
#: What a browser and a script ask for while jobs come in.
READS = ("/", "/jobs?limit=100", "/ui/studies", "/ui/compare", "/metrics", "/readyz")
MIB = 2**20
UPLOAD_BYTES = 256 * MIB
MAX_SERVER_GROWTH_MIB = 16.0
MAX_WORKER_GROWTH_MIB = 64.0
#: The arrays are read in pieces; what is kept of each grid is 24 bytes.
MAX_UPLOAD_MIB = 128.0

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--trained", type=int, default=200)
    arguments = parser.parse_args()
    machine = describe_machine(PACKAGES)
    rows = [
        measure_server(arguments.jobs),
        measure_worker(arguments.trained),
        measure_upload(),
    ]
    for row in rows:
        print(f"{row['name']}: {row['grown_mib']:.1f} MiB (limit {row['limit_mib']:g})")
    write_results("memory", machine | {"rows": rows})


def measure_server(num_jobs: int) -> Row:
    """Of the server while jobs are posted, read and cancelled."""
    with running("serve") as (client, pids):
        points = []
        for done in range(num_jobs):
            job_id = client.post("/jobs", json=TINY).raise_for_status().json()["id"]
            client.post(f"/jobs/{job_id}/cancel").raise_for_status()
            client.get(f"/ui/jobs/{job_id}").raise_for_status()
            if (done + 1) % (num_jobs // NUM_POINTS) == 0:
                for path in READS:
                    client.get(path).raise_for_status()
                points.append(read_resident_mib(pids["serve"]))
    return describe(f"server, {num_jobs:,} jobs", points, limit_mib=MAX_SERVER_GROWTH_MIB)


def measure_worker(num_jobs: int) -> Row:
    """Of a worker that trains one job after the other."""
    with running("serve", "worker") as (client, pids):
        points = []
        for done in range(num_jobs):
            job_id = client.post("/jobs", json=TINY).raise_for_status().json()["id"]
            wait_for(lambda job=job_id: read_status(client, job) == "succeeded")
            if (done + 1) % (num_jobs // NUM_POINTS) == 0:
                points.append(read_resident_mib(pids["worker"]))
    return describe(f"worker, {num_jobs} jobs", points, limit_mib=MAX_WORKER_GROWTH_MIB)


def measure_upload() -> Row:
    """Of the server while it takes a data set, against before."""
    with running("serve") as (client, pids):
        client.get("/").raise_for_status()
        before = read_resident_mib(pids["serve"])
        client.put("/datasets/large", content=make_upload(), timeout=600).raise_for_status()
        peak = read_resident_mib(pids["serve"], name="VmHWM")
    return {
        "name": f"server, an upload of {UPLOAD_BYTES // MIB} MiB",
        "mib": [round(before, 1), round(peak, 1)],
        "grown_mib": round(peak - before, 1),
        "limit_mib": MAX_UPLOAD_MIB,
    }


def make_upload() -> bytes:
    """Random grids that no compression makes smaller."""
    num_grids = (UPLOAD_BYTES - MIB) // 32**2
    grids = np.random.default_rng(0).integers(0, 10, size=(num_grids, 32, 32), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, images=grids)
    return buffer.getvalue()


def describe(name: str, points: list[float], *, limit_mib: float) -> Row:
    quarter = len(points) // 4
    return {
        "name": name,
        "mib": [round(point, 1) for point in points],
        "grown_mib": round(max(points[-quarter:]) - max(points[:quarter]), 1),
        "limit_mib": limit_mib,
    }


def read_status(client: httpx.Client, job_id: str) -> str:
    status: str = client.get(f"/jobs/{job_id}").raise_for_status().json()["status"]
    return status


def read_resident_mib(pid: int, *, name: str = "VmRSS") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kib) / 1024


@contextmanager
def running(*commands: str) -> Iterator[tuple[httpx.Client, dict[str, int]]]:
    """Processes with a data directory of their own, and a client of the server."""
    limits = {"LOSSLAB_RATE_LIMIT": "1000000/minute", "LOSSLAB_POLL_SECONDS": "0.05"}
    with (
        tempfile.TemporaryDirectory() as directory,
        start(Path(directory), *commands, **limits) as (url, pids),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client, pids


if __name__ == "__main__":
    main()
