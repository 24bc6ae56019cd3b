"""Studies whose jobs have ended, made without training."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from artificial_runs import MEASURED
from sqlalchemy import Engine, insert, update
from sqlmodel import Session, col, select

from server.api.study_requests import StudyRequest
from server.database.engine import write_transaction
from server.jobs.seeds import submit_study
from server.models.columns import utc_now
from server.models.epochs import EpochMetrics
from server.models.studies import StudyJob
from server.models.tables import Job, JobStatus

#: What a seed of this diagnosis reaches: accuracy, recall, IoU and the weakest KL.
REACHED = {
    "healthy": (0.83, 0.66, 0.22, 0.4),
    "mode_collapse": (0.93, 0.01, 0.01, 0.2),
    "decision_collapse": (0.93, 0.01, 0.01, 0.2),
    "posterior_collapse": (0.93, 0.01, 0.01, 0.004),
    "under_informed": (0.82, 0.6, 0.2, 0.004),
    "over_painted": (0.4, 0.85, 0.09, 0.3),
    "out_of_range": (0.9, 0.7, 0.3, 0.35),
    "unstable": (0.83, 0.66, 0.22, 0.4),
    "diverged": (0.83, 0.66, 0.22, 0.4),
    "too_short": (0.93, 0.01, 0.01, 0.2),
}
#: Where it differs from what is measured of a healthy seed.
MEASURED_OF = {
    # Older than the measures, so that the kind of the collapse is not known.
    "mode_collapse": dict.fromkeys(MEASURED),
    "posterior_collapse": {"val_mutual_information": 0.02},
    "unstable": {"max_spike_ratio": 9.0},
}
_BLACK = ("mode_collapse", "decision_collapse", "posterior_collapse", "too_short")


def store_study(
    engine: Engine, outcomes: Mapping[str, Sequence[str]], *, grid: Any = None, **body: Any
) -> str:
    """A study whose seeds had these outcomes by option: a diagnosis, or a status of a job.

    With a grid, an option's outcomes are those of each of its arms. Returns the study's id.
    """
    num_seeds = len(next(iter(outcomes.values())))
    fields = {"num_seeds": num_seeds, "quick_test": True, "grid": grid or {}} | body
    request = StudyRequest.model_validate({"options": list(outcomes)} | fields)
    with write_transaction(engine) as session:
        study = request.make_study(session, datasets_dir=Path())
        submit_study(session, study, seeds=request.list_seeds())
        study_id = study.id
    _end_jobs(engine, study_id, outcomes)
    return study_id


def _end_jobs(engine: Engine, study_id: str, outcomes: Mapping[str, Sequence[str]]) -> None:
    with Session(engine) as session:
        links = select(StudyJob, Job).join(Job, col(Job.id) == col(StudyJob.job_id))
        found = [
            (job.id, outcomes[job.option][link.position], job.config)
            for link, job in session.exec(links.where(col(StudyJob.study_id) == study_id))
        ]
    with engine.begin() as connection:
        for job_id, outcome, config in found:
            is_judged = outcome in REACHED
            status = JobStatus.succeeded if is_judged else JobStatus(outcome)
            values = _describe_end(status, num_epochs=config["epochs"])
            if outcome == "too_short":
                values["dataset_summary"] |= {"num_train": 400}
            connection.execute(update(Job).where(col(Job.id) == job_id).values(values))
            if is_judged:
                rows = list(_make_rows(job_id, outcome, num_epochs=config["epochs"]))
                connection.execute(insert(EpochMetrics), rows)


def _describe_end(status: JobStatus, *, num_epochs: int) -> dict[str, Any]:
    if status == JobStatus.queued:
        return {"status": status}
    now = utc_now()
    is_done = status == JobStatus.succeeded
    return {
        "status": status,
        "attempt": 1,
        "progress": 1.0 if is_done else 0.4,
        "epochs_completed": num_epochs if is_done else 0,
        "started_at": now,
        "ended_at": now if status.is_terminal else None,
        "dataset_summary": {"background_share": 0.93},
    }


def _make_rows(job_id: str, outcome: str, *, num_epochs: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(job_id)
    accuracy, recall, iou, kl = (each * chance.uniform(0.98, 1.02) for each in REACHED[outcome])
    for epoch in range(1, num_epochs + 1):
        left = 0.09 * (1 - epoch / num_epochs) * chance.uniform(0.9, 1.1)
        if outcome == "diverged":
            left = 0.1 * epoch / num_epochs
        measured = {
            "loss": 0.1 + left,
            "recon_loss": 0.08 + left,
            "kl_loss": 0.02,
            "pixel_accuracy": accuracy - left,
            "foreground_recall": recall,
            "foreground_iou": max(0.0, iou - left / 3),
            "balanced_accuracy": 0.7,
            "background_share": 0.37 if outcome == "over_painted" else 0.89,
            "all_black_share": 0.9 if outcome in _BLACK else 0.0,
            "exact_grid_rate": 0.01,
            "recall_per_colour": [0.9] + [0.5] * 9,
            "kl_per_dimension": [kl, *(1.5 + chance.random() for _ in range(9))],
            "active_units": 10,
        }
        yield {
            "job_id": job_id,
            "epoch": epoch,
            "attempt": 1,
            "recorded_at": utc_now(),
            "seconds": 1.0,
            "grids_per_second": 1e4,
            "beta": 1.0,
            "learning_rate": 1e-3,
            "num_loss_spikes": 0,
            "max_spike_ratio": 1.2,
            **{
                f"{split}_{name}": measured[name] for split in ("train", "val") for name in measured
            },
            **MEASURED,
            "val_active_units_variance": 10,
            **MEASURED_OF.get(outcome, {}),
        }
