"""A large study whose jobs have all ended, written as rows, without training."""

import random
from datetime import timedelta
from typing import Any

from many_jobs import FIRST_CREATED_AT, make_epoch
from sqlalchemy import Engine, insert
from sqlmodel import Session

from server.judging.statistics import plan_looks
from server.models.configuration import compute_config_sha256, resolve_config
from server.models.epochs import EpochMetrics
from server.models.options import OPTIONS, BuiltInOption
from server.models.studies import Arm, Study, StudyJob
from server.models.tables import Job, JobStatus

_BATCH = 1000


def store_study(
    engine: Engine, *, num_arms: int, num_seeds: int, num_epochs: int, name: str | None = None
) -> str:
    """Store a study with random metrics; the same numbers give the same rows. Returns its id."""
    chance = random.Random(0)
    arms = [make_arm(number, num_epochs=num_epochs) for number in range(num_arms)]
    looks = plan_looks(num_seeds)
    study = Study(
        name=name,
        arms=[arm.model_dump(mode="json") for arm in arms],
        seeds=list(range(num_seeds)),
        data_seed=42,
        looks=looks,
        num_planned_looks=len(looks),
        max_seeds=num_seeds,
        thresholds={"max_accuracy": 0.95},
        created_at=FIRST_CREATED_AT,
    )
    study_id = study.id
    pairs = [(index, seed) for seed in range(num_seeds) for index in range(num_arms)]
    jobs = [make_job(chance, study_id, arms[index], seed=seed) for index, seed in pairs]
    links = [
        {"study_id": study_id, "seed": seed, "arm": index, "position": seed, "job_id": job["id"]}
        for (index, seed), job in zip(pairs, jobs, strict=True)
    ]
    epochs = [
        make_epoch(chance, job["id"], epoch, num_epochs=num_epochs)
        for job in jobs
        for epoch in range(1, num_epochs + 1)
    ]
    with Session(engine) as session:
        session.add(study)
        session.commit()
    with engine.begin() as connection:
        for model, rows in ((Job, jobs), (StudyJob, links), (EpochMetrics, epochs)):
            for first in range(0, len(rows), _BATCH):
                connection.execute(insert(model), rows[first : first + _BATCH])
    return study_id


def make_arm(number: int, *, num_epochs: int) -> Arm:
    overrides = {"epochs": num_epochs, "beta": 0.5 + number}
    config = resolve_config(OPTIONS[BuiltInOption.b].config, overrides=overrides)
    return Arm(
        name=f"b beta={0.5 + number}",
        option="b",
        config=config.model_dump(mode="json"),
        config_sha256=compute_config_sha256(config),
    )


def make_job(chance: random.Random, study_id: str, arm: Arm, *, seed: int) -> dict[str, Any]:
    return {
        "id": f"{chance.getrandbits(48):012x}",
        "name": f"{arm.name} seed {seed}",
        "option": arm.option,
        "metadata": {},
        "config": {**arm.config, "seed": seed},
        "config_sha256": arm.config_sha256,
        "study_id": study_id,
        "status": JobStatus.succeeded,
        "progress": 1.0,
        "attempt": 1,
        "created_at": FIRST_CREATED_AT,
        "started_at": FIRST_CREATED_AT + timedelta(seconds=1),
        "ended_at": FIRST_CREATED_AT + timedelta(hours=1),
        "epochs_completed": arm.config["epochs"],
        "device": "cpu",
        "dataset_summary": {
            "num_train": 80_000,
            "num_val": 10_000,
            "num_test": 10_000,
            "grid_size": 16,
            "sha256": "ab" * 32,
            "background_share": 0.9315,
        },
    }
