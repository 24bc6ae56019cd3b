"""A database like after years of use: many jobs of all kinds, with all their rows."""

import math
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from known_measures import make_measures
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, String, Table, insert, select
from sqlmodel import Session, SQLModel

from server.judging.statistics import plan_looks
from server.models.configuration import TrainingConfig, compute_config_sha256, resolve_config
from server.models.epochs import EpochMetrics
from server.models.options import OPTIONS, BuiltInOption
from server.models.studies import Study, StudyJob
from server.models.tables import (
    Artifact,
    ArtifactKind,
    EventKind,
    Job,
    JobEvent,
    JobLabel,
    JobStatus,
)

FIRST_CREATED_AT = datetime(2026, 1, 1, tzinfo=UTC)
NUM_MODELS = 30  # jobs whose rows the other ones copy
NUM_ACTIVE = 200  # of the newest jobs
COMMON_NAME, COMMON_STUDY, RARE_STUDY = "baseline", "ablation", "pilot"
_ENDED = [JobStatus.succeeded] * 90 + [JobStatus.failed] * 6 + [JobStatus.cancelled] * 4
_STUDIES = [COMMON_STUDY] * 30 + [f"study {number}" for number in range(40)]
_OWNERS = ["ada", "emmy", "grace", "sofia"]

Values = dict[str, Any]


def fill(engine: Engine, *, num_jobs: int, num_epochs: int) -> None:
    """Fill an empty database; the same numbers give the same rows."""
    chance = random.Random(0)
    jobs = [make_job(chance, number, num_jobs=num_jobs, num_epochs=num_epochs)
            for number in range(num_jobs)]  # fmt: skip
    models = jobs[:NUM_MODELS]
    copies = Table(
        "copies",
        MetaData(),
        Column("number", Integer, primary_key=True),
        Column("job_id", String),
        Column("model_id", String),
        prefixes=["TEMPORARY"],
    )
    pairs = [
        {"number": number, "job_id": job["id"], "model_id": models[number % NUM_MODELS]["id"]}
        for number, job in enumerate(jobs)
        if number >= NUM_MODELS and job["status"] != JobStatus.queued
    ]
    with engine.begin() as connection:
        connection.execute(insert(Job), jobs)
        connection.execute(insert(JobLabel), list(make_label_rows(jobs)))
        fill_models(connection, models, num_epochs=num_epochs)
        copies.create(connection)
        connection.execute(insert(copies), pairs)
        for first in range(0, num_jobs, 1000):
            for model in (EpochMetrics, JobEvent, Artifact):
                copy_rows(connection, model, copies, first=first, last=first + 999)
        copies.drop(connection)


def fill_studies(
    engine: Engine, job_ids: Sequence[str], *, num_studies: int, num_arms: int, num_seeds: int
) -> list[str]:
    """Studies that count some of the jobs, each a seed of an arm; returns their ids."""
    chance = random.Random(num_studies)
    arms = [make_arm(number) for number in range(num_arms)]
    ids = [f"{chance.getrandbits(48):012x}" for _ in range(num_studies)]
    places = [(arm, seed) for seed in range(num_seeds) for arm in range(num_arms)]
    rows = [
        {
            "id": study_id,
            "name": f"study {number}",
            "labels": {"owner": chance.choice(_OWNERS)},
            "arms": arms,
            "seeds": list(range(num_seeds)),
            "rounds": [num_seeds],
            "looks": plan_looks(num_seeds),
            "num_planned_looks": len(plan_looks(num_seeds)),
            "max_seeds": num_seeds,
            "thresholds": {},
            "created_at": FIRST_CREATED_AT + timedelta(minutes=number),
        }
        for number, study_id in enumerate(ids)
    ]
    links = [
        {"study_id": study_id, "seed": seed, "position": seed, "arm": arm, "job_id": job_id}
        for study_id in ids
        for (arm, seed), job_id in zip(places, chance.sample(job_ids, len(places)), strict=True)
    ]
    with Session(engine) as session:
        session.add_all([Study(**row) for row in rows])
        session.flush()
        session.execute(insert(StudyJob), [{**link, "is_reused": True} for link in links])
        session.commit()
    return ids


def make_arm(number: int) -> Values:
    config = TrainingConfig(beta=number / 10).model_dump(mode="json")
    arm = {"name": f"b beta={number / 10}", "option": "b", "config": config}
    return arm | {"config_sha256": f"{number:064x}"}


def make_job(chance: random.Random, number: int, *, num_jobs: int, num_epochs: int) -> Values:
    """The oldest is number 0; the newest wait or run."""
    option = chance.choices(list(BuiltInOption), weights=[50, 49, 1])[0]
    num_younger = num_jobs - 1 - number
    created_at = FIRST_CREATED_AT + timedelta(minutes=5 * number, seconds=chance.random())
    is_active = num_younger < NUM_ACTIVE and number >= NUM_MODELS
    status = chance.choice(_ENDED)
    if is_active:
        status = JobStatus.running if num_younger >= NUM_ACTIVE - 4 else JobStatus.queued
    elif number % 500 == NUM_MODELS:
        status = JobStatus.paused
    config = resolve_config(OPTIONS[option].config, overrides={"epochs": num_epochs})
    return {
        "id": f"{chance.getrandbits(48):012x}",
        "name": make_name(chance, number),
        "option": option,
        "quick_test": False,
        "metadata": make_labels(chance, number),
        "priority": 0,
        "config": config.model_dump(mode="json") | {"seed": chance.randrange(100)},
        "config_sha256": compute_config_sha256(config),
        "status": status,
        "progress": 1.0 if status is JobStatus.succeeded else chance.random(),
        "attempt": 1,
        "num_lost_attempts": 0,
        "claimed_progress": 0.0,
        "created_at": created_at,
        "started_at": None if status is JobStatus.queued else created_at + timedelta(seconds=1),
        "ended_at": created_at + timedelta(hours=1) if status.is_terminal else None,
        "epochs_completed": 0 if status is JobStatus.queued else num_epochs,
        "best_epoch": num_epochs,
        "best_val_recon_loss": chance.random(),
        "train_loss": chance.random(),
        "train_pixel_accuracy": chance.random(),
        "val_foreground_recall": chance.random(),
        "val_foreground_iou": chance.random(),
        "device": "cpu",
        "dataset_summary": {"background_share": 0.931, "num_train": 80_000, "num_val": 10_000},
        "test_metrics": {"pixel_accuracy": chance.random(), "recall": make_shares(chance)},
    }


def make_name(chance: random.Random, number: int) -> str | None:
    kind = chance.random()
    if kind < 0.3:
        return None
    return COMMON_NAME if kind < 0.5 else f"run {number}" if kind < 0.8 else f"sweep {number // 50}"


def make_labels(chance: random.Random, number: int) -> dict[str, str]:
    """Half of the jobs have none."""
    if number % 10_000 == NUM_MODELS:
        return {"study": RARE_STUDY}
    if chance.random() < 0.5:
        return {}
    return {"study": chance.choice(_STUDIES), "owner": chance.choice(_OWNERS), "n": str(number)}


def make_label_rows(jobs: list[Values]) -> Iterator[Values]:
    for job in jobs:
        for key, value in job["metadata"].items():
            row = {"job_id": job["id"], "key": key, "value": value}
            yield row | {"created_at": job["created_at"]}


def fill_models(connection: Connection, jobs: list[Values], *, num_epochs: int) -> None:
    chance = random.Random(1)
    for job in jobs:
        epochs = range(1, num_epochs + 1)
        rows = [make_epoch(chance, job["id"], epoch, num_epochs=num_epochs) for epoch in epochs]
        connection.execute(insert(EpochMetrics), rows)
        connection.execute(insert(JobEvent), [make_event(job["id"], epoch) for epoch in epochs])
        connection.execute(
            insert(Artifact),
            [
                make_artifact(chance, job["id"], epoch, kind=kind)
                for epoch in epochs
                if epoch % 5 == 0 or epoch == num_epochs
                for kind in ArtifactKind
            ],
        )


def make_epoch(chance: random.Random, job_id: str, epoch: int, *, num_epochs: int) -> Values:
    """A curve that mostly falls, with as many digits as in a real training."""
    row: Values = {
        "job_id": job_id,
        "epoch": epoch,
        "attempt": 1,
        "recorded_at": FIRST_CREATED_AT + timedelta(minutes=epoch),
        "seconds": 20 + chance.random(),
        "grids_per_second": 4000 * chance.random(),
        "beta": min(1.0, 5 * epoch / num_epochs),
        "learning_rate": 1e-3 * chance.random(),
        "num_loss_spikes": 0,
        "max_spike_ratio": 1 + chance.random(),
    }
    for split in ("train", "val"):
        names = ("pixel_accuracy", "foreground_recall", "foreground_iou", "balanced_accuracy",
                 "background_share", "all_black_share", "exact_grid_rate")  # fmt: skip
        row |= {f"{split}_{name}": 0.8 + chance.random() / 100 for name in names}
        for name in ("loss", "recon_loss", "kl_loss"):
            row[f"{split}_{name}"] = (1 + chance.random() / 1000) / math.sqrt(epoch)
        row[f"{split}_recall_per_colour"] = make_shares(chance)
        row[f"{split}_kl_per_dimension"] = make_shares(chance)
        row[f"{split}_active_units"] = 10
    return row | make_measures(factor=0.9 + chance.random() / 10)


def make_event(job_id: str, epoch: int) -> Values:
    data = {"epoch": epoch, "train_loss": 1 / epoch, "val_foreground_recall": 0.6}
    return {
        "job_id": job_id,
        "kind": EventKind.epoch,
        "message": f"epoch {epoch}: training loss {1 / epoch:.4f}, foreground recall 0.600",
        "data": data,
        "created_at": FIRST_CREATED_AT + timedelta(minutes=epoch),
    }


def make_artifact(chance: random.Random, job_id: str, epoch: int, *, kind: ArtifactKind) -> Values:
    names = ("pixel_accuracy", "foreground_recall", "loss")
    samples = [{name: chance.random() for name in names} for _ in range(10)]
    return {
        "job_id": job_id,
        "kind": kind,
        "epoch": epoch,
        "file_name": f"{kind}_epoch_{epoch}.bin",
        "size_bytes": 10_000_000,
        "sha256": f"{chance.getrandbits(256):064x}",
        "samples": samples if kind is ArtifactKind.reconstruction else None,
        "created_at": FIRST_CREATED_AT + timedelta(minutes=epoch),
    }


def make_shares(chance: random.Random) -> list[float]:
    return [chance.random() for _ in range(10)]


def copy_rows(
    connection: Connection, model: type[SQLModel], copies: Table, *, first: int, last: int
) -> None:
    """Give each job of these numbers the rows of its model."""
    table: Table = model.__table__  # type: ignore[attr-defined]
    columns = [column for column in table.columns if column.name not in ("id", "job_id")]
    rows = (
        select(copies.c.job_id, *columns)
        .join(table, table.c.job_id == copies.c.model_id)
        .where(copies.c.number.between(first, last))
        .order_by(copies.c.number)
    )
    names = ["job_id", *(column.name for column in columns)]
    connection.execute(insert(table).from_select(names, rows))
