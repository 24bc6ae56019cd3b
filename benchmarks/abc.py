"""The main experiment: options a, b and c on the full default corpus, three seeds each.

Runs the jobs through the real queue and worker processes, writes `results/abc.json`, and puts a row
per job into `docs/results.md`. About two minutes per option and seed on two cores with bf16:

    python -m benchmarks.abc

More seeds, in a separate file, show the random variation:

    python -m benchmarks.abc --options b --seeds 0 1 2 3 4 5 6 7 8 9 --results seeds_float32
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sqlmodel import Session

from benchmarks.machine import REPOSITORY, describe_machine, show, write_results
from server.database.engine import open_database, write_transaction
from server.jobs.submission import new_job, submit_job
from server.judging.histories import read_epochs
from server.judging.verdicts import judge
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Job
from server.settings import Settings

#: The results that the documentation shows.
SHOWN_RESULTS = "abc"
RESULTS_PAGE = REPOSITORY / "docs" / "results.md"
PACKAGES = ("losslab", "torch", "numpy")


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    settings = Settings(data_dir=arguments.data_dir)
    engine = open_database(settings)
    with write_transaction(engine) as session:
        job_ids = [
            submit_job(
                session,
                new_job(
                    resolve_config(
                        OPTIONS[option].config,
                        quick_test=True,
                        overrides={"seed": seed, "num_samples": arguments.num_samples},
                    ),
                    option=option,
                    quick_test=True,
                    name=f"{option}, seed {seed}",
                ),
            ).id
            for seed in arguments.seeds
            for option in arguments.options
        ]
    drain(settings, num_workers=arguments.workers)
    with Session(engine) as session:
        rows = [describe(session, session.get_one(Job, job_id)) for job_id in job_ids]
    rows.sort(key=lambda row: (row["option"], row["seed"]))
    table = format_table(rows)
    print(table)
    if arguments.no_write:
        return
    write_results(arguments.results, machine | {"num_workers": arguments.workers, "jobs": rows})
    if arguments.results == SHOWN_RESULTS:
        show(table, name="abc", page=RESULTS_PAGE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=REPOSITORY / "experiments" / "abc")
    parser.add_argument("--num-samples", type=int, default=100_000)
    parser.add_argument("--options", type=BuiltInOption, nargs="+", default=list(BuiltInOption))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="workers that share the cores")
    parser.add_argument("--results", default=SHOWN_RESULTS, help="name of the file in results/")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def drain(settings: Settings, *, num_workers: int) -> None:
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_NUM_WORKERS": str(num_workers),
    }
    command = [sys.executable, "-m", "worker", "--drain"]
    workers = [subprocess.Popen(command, env=environment) for _ in range(num_workers)]
    exit_codes = [worker.wait() for worker in workers]
    if any(exit_codes):
        raise SystemExit(f"a worker ended with {exit_codes}")


def describe(session: Session, job: Job) -> dict[str, Any]:
    """A job's results, with its verdict."""
    epochs = read_epochs(session, job.id)
    verdict = judge(job, epochs)
    final = epochs[-1]
    kl = final.val_kl_per_dimension
    return {
        "option": job.option,
        "seed": job.config["seed"],
        "train_pixel_accuracy": final.train_pixel_accuracy,
        "val_foreground_recall": final.val_foreground_recall,
        "val_foreground_iou": final.val_foreground_iou,
        "min_kl_per_dimension": min(kl),
        "mean_kl_per_dimension": sum(kl) / len(kl),
        "outcome": verdict.outcome,
        "diagnosis": verdict.diagnosis,
        "criteria": {criterion.name: criterion.status for criterion in verdict.criteria},
        "epoch_seconds": [round(epoch.seconds, 2) for epoch in epochs],
        "epochs": [
            {"train_pixel_accuracy": e.train_pixel_accuracy, "train_loss": e.train_loss}
            for e in epochs
        ],
        "test_metrics": job.test_metrics,
        "device": job.device,
        "config": job.config,
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| option | seed | final training accuracy | validation foreground recall | IoU | "
        "KL per dimension (min, mean) | criteria passed | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        statuses = list(row["criteria"].values())
        missed = [name for name, status in row["criteria"].items() if status != "passed"]
        lines.append(
            f"| {row['option']} | {row['seed']} | {row['train_pixel_accuracy']:.1%} "
            f"| {row['val_foreground_recall']:.3f} | {row['val_foreground_iou']:.3f} "
            f"| {row['min_kl_per_dimension']:.2f}, {row['mean_kl_per_dimension']:.2f} "
            f"| {statuses.count('passed')} of {len(statuses)}"
            f"{'; not ' + ', '.join(missed) if missed else ''} "
            f"| {row['outcome']}: {row['diagnosis']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
