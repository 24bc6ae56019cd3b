"""Compare losses with a study on a running Losslab: which option escapes collapse more often?

    losslab up --workers 2 &
    python examples/compare_losses.py --seeds 5 --num-samples 20000

It needs only httpx, not Losslab itself. LOSSLAB_URL is the service's address, LOSSLAB_API_TOKEN its
token if it needs one.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import httpx

#: Includes paused, since a paused study changes only if a user resumes it.
SETTLED = {"succeeded", "failed", "cancelled", "paused"}


def main() -> None:
    arguments = parse_arguments()
    url = os.environ.get("LOSSLAB_URL", "http://127.0.0.1:8000")
    token = os.environ.get("LOSSLAB_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
        study_id = post_study(http, arguments)
        study = wait(http, study_id)
        print_table(study)
        print(f"Decision ({study['recommendation']['state']}): {study['recommendation']['reason']}")
        report = http.get(f"/studies/{study_id}/report.html").raise_for_status()
        arguments.report.write_bytes(report.content)
        print(f"Report: {arguments.report}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare options by several seeds of each.")
    parser.add_argument("options", nargs="*", default=["a", "b", "c"])
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each option")
    parser.add_argument("--num-samples", type=int, default=100_000, help="grids per job")
    parser.add_argument("--report", type=Path, default=Path("study.html"))
    return parser.parse_args()


def post_study(http: httpx.Client, arguments: argparse.Namespace) -> str:
    body = {
        "options": arguments.options,
        "num_seeds": arguments.seeds,
        "quick_test": True,
        "config": {"num_samples": arguments.num_samples},
    }
    answer = http.post("/studies", json=body)
    if answer.status_code != 201:
        raise SystemExit(f"the study was refused: {answer.text}")
    return str(answer.json()["id"])


def wait(http: httpx.Client, study_id: str) -> dict[str, Any]:
    """Ask until the study has ended; says how it goes."""
    said = None
    while True:
        study: dict[str, Any] = http.get(f"/studies/{study_id}").raise_for_status().json()
        counts = [f"{arm['arm']} {arm['num_passed']}/{arm['num_judged']}" for arm in study["arms"]]
        if counts != said:
            print(f"{study['progress']:4.0%}  passed: {', '.join(counts)}", flush=True)
            said = counts
        if study["status"] in SETTLED:
            return study
        time.sleep(1)


def print_table(study: dict[str, Any]) -> None:
    print(f"{'arm':12}{'passed':>9}{'95 % interval':>16}{'IoU':>7}  state")
    for arm in study["arms"]:
        passed = f"{arm['num_passed']} of {arm['num_judged']}"
        interval = arm["pass_rate_interval"]
        shown = f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "-"
        iou = arm["metrics"]["val_foreground_iou"]["median"]
        median = "-" if iou is None else f"{iou:.2f}"
        print(f"{arm['arm']:12}{passed:>9}{shown:>16}{median:>7}  {arm['state']}")


if __name__ == "__main__":
    main()
