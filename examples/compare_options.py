"""Train options a, b and c as quick tests on a running Losslab and compare them.

    losslab up &
    python examples/compare_options.py --num-samples 20000

It needs only httpx, not Losslab itself. LOSSLAB_URL is the service's address, LOSSLAB_API_TOKEN its
token if it needs one.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import httpx

#: Includes paused, since a paused job changes only if a user resumes it.
SETTLED = {"succeeded", "failed", "cancelled", "paused"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare options a, b and c.")
    parser.add_argument("--num-samples", type=int, default=100_000, help="grids per job")
    parser.add_argument("--report", type=Path, default=Path("comparison.html"))
    arguments = parser.parse_args()
    url = os.environ.get("LOSSLAB_URL", "http://127.0.0.1:8000")
    token = os.environ.get("LOSSLAB_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
        job_ids = [
            post_job(http, option=option, num_samples=arguments.num_samples) for option in "abc"
        ]
        for job_id in job_ids:
            wait(http, job_id=job_id)
        query = {"job_id": job_ids}
        print_table(http.get("/comparisons", params=query).raise_for_status().json())
        report = http.get("/comparisons/report.html", params=query).raise_for_status()
        arguments.report.write_bytes(report.content)
        print(f"Report: {arguments.report}")


def post_job(http: httpx.Client, *, option: str, num_samples: int) -> str:
    body = {"option": option, "quick_test": True, "num_samples": num_samples}
    answer = http.post("/jobs", json=body)
    if answer.status_code != 201:
        raise SystemExit(f"option {option} was refused: {answer.text}")
    return str(answer.json()["id"])


def wait(http: httpx.Client, *, job_id: str) -> None:
    job: dict[str, Any] = {"status": "queued"}
    while job["status"] not in SETTLED:
        time.sleep(0.5)
        job = http.get(f"/jobs/{job_id}").raise_for_status().json()
    print(f"option {job['option']}: {job['status']} after {job['epochs_completed']} epochs")


def print_table(comparison: dict[str, Any]) -> None:
    print(f"{'option':8}{'accuracy':>10}{'recall':>8}  verdict")
    for entry in comparison["jobs"]:
        job, verdict = entry["job"], entry["verdict"]
        accuracy, recall = job["train_pixel_accuracy"], job["val_foreground_recall"]
        numbers = f"{accuracy:>10.1%}{recall:>8.2f}" if accuracy is not None else f"{'-':>18}"
        print(f"{job['option']:8}{numbers}  {verdict['outcome']}, {verdict['diagnosis']}")
    best = comparison["recommendation"]
    print(f"Recommended: {best['option']}, {best['reason']}" if best else comparison["reason"])


if __name__ == "__main__":
    main()
