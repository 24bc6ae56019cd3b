"""What four losses know and what they paint: the tables of the results page, from studies that the
product ran.

    losslab option add cross_entropy --base a --set use_focal_loss=false
    losslab study a b c cross_entropy --seeds 10 --quick --criteria evidence
    losslab study a b c cross_entropy --seeds 10 --epochs 30 --criteria evidence
    python -m benchmarks.evidence ID [ID ...]

Reads the studies from the server at LOSSLAB_URL, writes `results/evidence.json`, and puts a table
per study into the page of results.
"""

import argparse
import os
import statistics
from typing import Any

from benchmarks.machine import REPOSITORY, describe_machine, show, write_results
from server.client import DEFAULT_URL, LosslabClient

RESULTS_PAGE = REPOSITORY / "docs" / "results.md"
PACKAGES = ("losslab", "torch", "numpy", "scipy")
#: What the tables show of a run's last epoch: heading, metric and number format.
COLUMNS = (
    ("accuracy", "val_pixel_accuracy", ".3f"),
    ("recall", "val_foreground_recall", ".2f"),
    ("precision", "val_foreground_precision", ".2f"),
    ("IoU", "val_foreground_iou", ".2f"),
    ("painted", "painted_share", ".1%"),
    ("foreground AP", "val_foreground_ap", ".2f"),
    ("colour AP", "val_colour_ap", ".2f"),
    ("recall, matched", "val_matched_recall", ".2f"),
    ("IoU, matched", "val_matched_iou", ".2f"),
    ("accuracy, matched", "val_matched_accuracy", ".3f"),
    ("log-likelihood", "val_log_likelihood", ".3f"),
    ("balanced", "val_balanced_log_likelihood", ".2f"),
    ("KL", "kl", ".1f"),
    ("information", "val_mutual_information", ".1f"),
    ("active", "val_active_units_variance", ".0f"),
)

Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study_ids", metavar="ID", nargs="+")
    arguments = parser.parse_args()
    url, token = os.environ.get("LOSSLAB_URL", DEFAULT_URL), os.environ.get("LOSSLAB_API_TOKEN")
    with LosslabClient(url, token=token) as client:
        studies = [describe(client, study_id) for study_id in arguments.study_ids]
    results = describe_machine(PACKAGES) | {"studies": studies}
    write_results("evidence", results)
    page = format_page(results)
    print(page)
    show(page, name="evidence", page=RESULTS_PAGE)


def describe(client: LosslabClient, study_id: str) -> Json:
    """A study with the final metrics of each of its runs."""
    study = client.read_study(study_id)
    kept = ("name", "status", "num_jobs", "seeds", "data_seed", "recommendation")
    return {key: study[key] for key in kept} | {
        "arms": [describe_arm(client, arm) for arm in study["arms"]]
    }


def describe_arm(client: LosslabClient, arm: Json) -> Json:
    kept = ("arm", "state", "config", "config_sha256", "num_passed", "num_judged", "criteria")
    finals = [client.read_metrics(job_id)["data"][-1] for job_id in arm["jobs"]]
    return {key: arm[key] for key in (*kept, "diagnoses")} | {
        "metrics": {name: [read(name, final) for final in finals] for _, name, _ in COLUMNS},
        "seconds": round(statistics.median(final["seconds"] for final in finals), 2),
    }


def read(name: str, final: Json) -> float | None:
    match name:
        case "painted_share":
            return 1 - float(final["val_background_share"])
        case "kl":
            return float(sum(final["val_kl_per_dimension"]))
        case _:
            value: float | None = final[name]
            return value


def format_page(results: Json) -> str:
    return "\n\n".join(format_study(study) for study in results["studies"])


def format_study(study: Json) -> str:
    """A row per arm with the median over its seeds, and the decision."""
    epochs = study["arms"][0]["config"]["epochs"]
    lines = [
        f"**{epochs} epochs**, {len(study['seeds'])} seeds. {study['recommendation']['reason']}",
        "",
        f"| option | pass | {' | '.join(heading for heading, _, _ in COLUMNS)} | verdicts |",
        f"|{' --- |' * (len(COLUMNS) + 3)}",
    ]
    for arm in study["arms"]:
        diagnoses = sorted(arm["diagnoses"].items(), key=lambda entry: -entry[1])
        cells = [
            arm["arm"],
            f"{arm['num_passed']} of {arm['num_judged']}",
            *(format_median(arm["metrics"][name], form=form) for _, name, form in COLUMNS),
            ", ".join(f"{count} {name}" for name, count in diagnoses),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_median(values: list[float | None], *, form: str) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):{form}}" if found else "-"


if __name__ == "__main__":
    main()
