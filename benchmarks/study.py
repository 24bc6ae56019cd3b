"""The table of the README: a study that the product ran, as its server answers it.

    losslab option add b_free_bits --base b --set free_bits=0.1
    losslab option add cross_entropy --base a --set use_focal_loss=false
    losslab study a b b_free_bits c cross_entropy --seeds 10 --quick
    python -m benchmarks.study ID

Reads the study from the server at LOSSLAB_URL, writes `results/study.json`, and puts a row per arm
into the README.
"""

import argparse
import os
from typing import Any

from benchmarks.machine import REPOSITORY, describe_machine, show, write_results
from server.client import DEFAULT_URL, LosslabClient

README_PATH = REPOSITORY / "README.md"
PACKAGES = ("losslab", "torch", "numpy", "scipy")
#: What of an arm the file keeps.
ARM_FIELDS = (
    "arm", "option", "config", "config_sha256", "state", "num_passed", "num_judged", "num_missing",
    "pass_rate_interval", "criteria", "metrics", "diagnoses",
)  # fmt: skip
#: The metrics that the table shows, and their number format.
METRICS = {
    "train_pixel_accuracy": ".1%",
    "val_foreground_recall": ".2f",
    "val_foreground_iou": ".2f",
    "min_kl_per_dimension": ".2f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study_id", metavar="ID")
    arguments = parser.parse_args()
    url, token = os.environ.get("LOSSLAB_URL", DEFAULT_URL), os.environ.get("LOSSLAB_API_TOKEN")
    with LosslabClient(url, token=token) as client:
        study = client.read_study(arguments.study_id)
        seconds = sum_seconds(client, study)
    results = describe_machine(PACKAGES) | describe(study) | {"job_seconds": seconds}
    write_results("study", results)
    table = format_table(results)
    print(table)
    print(results["recommendation"]["reason"])
    show(table, name="study", page=README_PATH)


def describe(study: dict[str, Any]) -> dict[str, Any]:
    kept = ("name", "status", "num_jobs", "seeds", "data_seed", "looks", "recommendation")
    arms = [{key: arm[key] for key in ARM_FIELDS} for arm in study["arms"]]
    return {key: study[key] for key in kept} | {"arms": arms}


def sum_seconds(client: LosslabClient, study: dict[str, Any]) -> float:
    """The seconds of all epochs, without what lies between them."""
    jobs = [job_id for arm in study["arms"] for job_id in arm["jobs"]]
    rows = [row for job_id in jobs for row in client.read_metrics(job_id)["data"]]
    return round(sum(row["seconds"] for row in rows), 1)


def format_table(results: dict[str, Any]) -> str:
    """A row per arm: how many seeds passed, with the interval, and the range over the seeds."""
    lines = [
        "| arm | seeds that pass | pass rate, 95 % interval | training accuracy "
        "| foreground recall | IoU | weakest KL | verdicts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in results["arms"]:
        low, high = arm["pass_rate_interval"]
        diagnoses = sorted(arm["diagnoses"].items(), key=lambda entry: -entry[1])
        cells = [
            arm["arm"],
            f"{arm['num_passed']} of {arm['num_judged']}",
            f"{low:.2f} to {high:.2f}",
            *(format_range(arm["metrics"][name], form=form) for name, form in METRICS.items()),
            ", ".join(f"{count} {name}" for name, count in diagnoses),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_range(metric: dict[str, float], *, form: str) -> str:
    lowest, highest = f"{metric['min']:{form}}", f"{metric['max']:{form}}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


if __name__ == "__main__":
    main()
