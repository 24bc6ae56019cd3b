"""What losses know and what they paint: the tables of the results page, from studies that the
product ran.

    losslab option add b_free_bits --base b --set free_bits=0.1
    losslab option add cross_entropy --base a --set use_focal_loss=false
    losslab study a b b_free_bits c cross_entropy --seeds 10 --quick
    python -m benchmarks.evidence ID [ID ...]

Reads the studies from the server at LOSSLAB_URL by both sets of criteria, writes
`results/evidence.json`, and puts the tables into the page of results. Six times as long a training
has a file and tables of its own:

    losslab study a b cross_entropy c --seeds 10 --epochs 30
    python -m benchmarks.evidence ID --results thirty_epochs

So have the studies of short trainings, by which thresholds were chosen, but no tables:

    losslab study b c cross_entropy --grid num_samples=2500,5000,10000,20000 --seeds 3 --quick
    losslab study b --grid num_samples=30000,40000,60000 --seeds 3 --quick
    python -m benchmarks.evidence ID ID --results short_trainings
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import REPOSITORY, describe_machine, show, write_results
from server.client import DEFAULT_URL, LosslabClient

RESULTS_PAGE = REPOSITORY / "docs" / "results.md"
#: Files whose tables are between marks of the same name in the page.
SHOWN_RESULTS = ("evidence", "thirty_epochs")
PACKAGES = ("losslab", "torch", "numpy", "scipy")
#: What the tables show of a run's last epoch, what it paints and what it knows: heading, metric and
#: number format.
PAINTED = (
    ("accuracy", "val_pixel_accuracy", ".3f"),
    ("recall", "val_foreground_recall", ".2f"),
    ("precision", "val_foreground_precision", ".2f"),
    ("IoU", "val_foreground_iou", ".2f"),
    ("painted", "painted_share", ".1%"),
    ("recall, matched", "val_matched_recall", ".2f"),
    ("IoU, matched", "val_matched_iou", ".2f"),
    ("accuracy, matched", "val_matched_accuracy", ".3f"),
)
KNOWN = (
    ("foreground AP", "val_foreground_ap", ".2f"),
    ("colour AP", "val_colour_ap", ".2f"),
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
    parser.add_argument("--results", default=SHOWN_RESULTS[0], help="name of the file in results/")
    arguments = parser.parse_args()
    url, token = os.environ.get("LOSSLAB_URL", DEFAULT_URL), os.environ.get("LOSSLAB_API_TOKEN")
    with LosslabClient(url, token=token) as client:
        studies = [describe(client, study_id) for study_id in arguments.study_ids]
    results = describe_machine(PACKAGES) | {"studies": studies}
    write_results(arguments.results, results)
    page = format_page(results)
    print(page)
    if arguments.results in SHOWN_RESULTS:
        show(page, name=arguments.results, page=RESULTS_PAGE)


def describe(client: LosslabClient, study_id: str) -> Json:
    """A study, judged by each set of criteria, with the last metrics of each of its runs."""
    judged = {criteria: client.read_study(study_id, criteria) for criteria in ("spec", "evidence")}
    study = judged["spec"]
    kept = ("name", "status", "num_jobs", "seeds", "data_seed")
    return {key: study[key] for key in kept} | {
        "recommendations": {name: each["recommendation"] for name, each in judged.items()},
        "arms": [
            describe_arm(client, dict(zip(judged, arms, strict=True)))
            for arms in zip(*(each["arms"] for each in judged.values()), strict=True)
        ],
    }


def describe_arm(client: LosslabClient, judged: dict[str, Json]) -> Json:
    arm = judged["spec"]
    finals = [client.read_metrics(job_id)["data"][-1] for job_id in arm["jobs"]]
    names = [name for _, name, _ in (*PAINTED, *KNOWN)]
    verdicts = ("state", "num_passed", "num_judged", "criteria", "diagnoses")
    return {key: arm[key] for key in ("arm", "config", "config_sha256")} | {
        "verdicts": {name: {key: each[key] for key in verdicts} for name, each in judged.items()},
        "metrics": {name: [read(name, final) for final in finals] for name in names},
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
    """The medians over the seeds of each arm: what it paints, what it knows, and its verdicts."""
    config, num_seeds = study["arms"][0]["config"], len(study["seeds"])
    parts = [
        f"### {config['num_samples']:,} grids, {config['epochs']} epochs, {num_seeds} seeds",
        format_medians(study, columns=PAINTED),
        format_medians(study, columns=KNOWN),
        format_verdicts(study),
        *(
            f"By `{name}`: {recommendation['reason']}."
            for name, recommendation in study["recommendations"].items()
        ),
    ]
    return "\n\n".join(parts)


def format_medians(study: Json, *, columns: Sequence[tuple[str, str, str]]) -> str:
    rows = [
        [arm["arm"], *(format_median(arm["metrics"][name], form=form) for _, name, form in columns)]
        for arm in study["arms"]
    ]
    return format_table(["option", *(heading for heading, _, _ in columns)], rows)


def format_verdicts(study: Json) -> str:
    """How many seeds pass each set of criteria, and the diagnoses."""
    rows = []
    for arm in study["arms"]:
        cells = [arm["arm"]]
        for verdict in arm["verdicts"].values():
            diagnoses = sorted(verdict["diagnoses"].items(), key=lambda entry: -entry[1])
            cells.append(f"{verdict['num_passed']} of {verdict['num_judged']}")
            cells.append(", ".join(f"{count} {name}" for name, count in diagnoses))
        rows.append(cells)
    return format_table(["option", "`spec`", "verdicts", "`evidence`", "verdicts"], rows)


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_median(values: list[float | None], *, form: str) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):{form}}" if found else "-"


if __name__ == "__main__":
    main()
