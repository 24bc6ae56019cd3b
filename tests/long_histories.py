"""A database like after months of training, made without training."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import queue_job
from known_measures import make_measures
from sqlalchemy import update
from sqlmodel import col

from server.database.engine import open_database
from server.models.columns import utc_now
from server.models.configuration import resolve_config
from server.models.epochs import EpochMetrics
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Job, JobStatus
from server.settings import Settings

BACKGROUND_SHARE = 0.93


def fill_database(data_dir: Path, *, num_jobs: int, num_epochs: int) -> list[str]:
    """Jobs that have succeeded, with plausible metrics; returns their ids."""
    engine = open_database(Settings(data_dir=data_dir))
    job_ids = []
    for seed in range(num_jobs):
        option = list(BuiltInOption)[seed % len(BuiltInOption)]
        overrides = {"epochs": num_epochs, "seed": seed}
        config = resolve_config(OPTIONS[option].config, overrides=overrides)
        job = queue_job(engine, option=option, config=config, name=f"seed {seed}")
        job_ids.append(job.id)
    ended = {
        "status": JobStatus.succeeded,
        "epochs_completed": num_epochs,
        "progress": 1.0,
        "best_epoch": num_epochs,
        "started_at": utc_now(),
        "ended_at": utc_now(),
        "train_pixel_accuracy": 0.83,
        "val_foreground_recall": 0.66,
        "val_foreground_iou": 0.22,
        "dataset_summary": {"background_share": BACKGROUND_SHARE},
    }
    rows = [
        row
        for seed, job_id in enumerate(job_ids)
        for row in _make_rows(job_id, seed=seed, num_epochs=num_epochs)
    ]
    with engine.begin() as connection:
        connection.execute(EpochMetrics.__table__.insert(), rows)  # type: ignore[attr-defined]
        connection.execute(update(Job).where(col(Job.id).in_(job_ids)).values(ended))
    engine.dispose()
    return job_ids


def _make_rows(job_id: str, *, seed: int, num_epochs: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    for epoch in range(1, num_epochs + 1):
        left = math.exp(-epoch / 60) + rng.random() * 0.01
        measured = {
            "loss": 0.1 + left,
            "recon_loss": 0.08 + left,
            "kl_loss": 0.02,
            "pixel_accuracy": 0.83 - 0.4 * left,
            "foreground_recall": 0.66 - 0.5 * left,
            "foreground_iou": 0.22 - 0.1 * left,
            "balanced_accuracy": 0.7,
            "background_share": 0.8,
            "all_black_share": 0.0,
            "exact_grid_rate": 0.01,
            "recall_per_colour": [0.9] + [0.5] * 9,
            "kl_per_dimension": [1.9 - left - 0.1 * d + rng.random() * 0.05 for d in range(10)],
            "active_units": 10,
        }
        yield {
            "job_id": job_id,
            "epoch": epoch,
            "attempt": 1,
            "recorded_at": utc_now(),
            "seconds": 1.0,
            "grids_per_second": 1e4,
            "beta": min(1.0, epoch / 100),
            "learning_rate": 1e-3 * (1 - epoch / num_epochs) + 1e-5,
            "num_loss_spikes": 0,
            "max_spike_ratio": 1.2,
            **{f"{split}_{k}": v for split in ("train", "val") for k, v in measured.items()},
            **make_measures(factor=1 - 0.4 * left),
        }
