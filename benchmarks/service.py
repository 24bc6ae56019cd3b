"""What a user waits for: a quick test from its request to its verdict, and a whole study.

Starts a server and a worker on SQLite. Prints the seconds of the first quick test after the start
and of the next ones, and those of a study of four arms and ten seeds with its decision. Writes
`results/service.json`; on a GPU it takes less than two minutes:

    python -m benchmarks.service
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.large_study import start_workers, wait_until
from benchmarks.machine import describe_machine, write_results
from benchmarks.store import serve
from server.settings import Settings

PACKAGES = ("losslab", "torch")
SOFT = {"name": "b free_bits=0.1", "base": "b", "config": {"free_bits": 0.1}}
TOY = {"epochs": 1, "num_samples": 200, "batch_size": 32}
NUM_NEXT = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny jobs, to try the script itself")
    parser.add_argument("--results", default="service", help="name of the file in results/")
    arguments = parser.parse_args()
    config = TOY if arguments.toy else {}
    with tempfile.TemporaryDirectory() as data_dir:
        settings = Settings(data_dir=Path(data_dir), database_url="")
        begun = time.perf_counter()
        with serve(settings) as client, start_workers(settings, client, number=1):
            results = describe_machine(PACKAGES) | {
                "worker": client.get("/workers").json()["data"][0]["device"],
                "seconds_until_ready": round(time.perf_counter() - begun, 1),
                "first_quick_test_seconds": time_quick_test(client, config=config),
            }
            rest = [
                time_quick_test(client, config=config) for _ in range(1 if config else NUM_NEXT)
            ]
            results["next_quick_test_seconds"] = statistics.median(rest)
            write_results(arguments.results, results)
            results["study"] = time_study(client, config=config, num_seeds=1 if config else 10)
    write_results(arguments.results, results)
    print(results)


def time_quick_test(client: httpx.Client, *, config: dict[str, Any]) -> float:
    """Seconds from the request to `succeeded`."""
    begun = time.perf_counter()
    body = {"option": "b", "quick_test": True, **config}
    job_id = client.post("/jobs", json=body).raise_for_status().json()["id"]
    wait_until(lambda: client.get(f"/jobs/{job_id}").json()["status"] == "succeeded")
    return round(time.perf_counter() - begun, 2)


def time_study(client: httpx.Client, *, config: dict[str, Any], num_seeds: int) -> dict[str, Any]:
    begun = time.perf_counter()
    body = {"options": ["a", "b", SOFT, "c"], "num_seeds": num_seeds, "quick_test": True}
    answer = client.post("/studies", json=body | ({"config": config} if config else {}))
    path = f"/studies/{answer.raise_for_status().json()['id']}"
    wait_until(lambda: client.get(path).json()["status"] == "succeeded")
    study = client.get(path).json()
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "num_jobs": study["num_jobs"],
        "passed": {
            arm["arm"]: f"{arm['num_passed']} of {arm['num_judged']}" for arm in study["arms"]
        },
        "decision": study["recommendation"]["reason"],
    }


if __name__ == "__main__":
    main()
