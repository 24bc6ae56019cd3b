"""How many grids of a data set a job uses: all of a user's own, unless it says how many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, SubmitJob, drain, read
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from sqlmodel import Session, select

from server.models.configuration import (
    TrainingConfig,
    compute_config_sha256,
    read_config,
    resolve_config,
)
from server.models.tables import EventKind, JobEvent
from server.settings import Settings
from worker.data import Dataset, load_dataset


@pytest.fixture
def load(settings: Settings, write_npz: Callable[..., str]) -> Callable[..., Dataset]:
    """Load grids of colour 1, then as many of colour 2, as a job of this configuration does."""
    train = np.repeat(np.array([1, 2], dtype=np.uint8), 100)[:, None, None]
    held_out = np.repeat(np.array([1, 2], dtype=np.uint8), 30)[:, None, None]
    splits = {"train": train, "val": held_out, "test": held_out}
    whole = {key: np.broadcast_to(a, (len(a), 8, 8)).copy() for key, a in splits.items()}
    name = write_npz(**whole)

    def read_it(**config: Any) -> Dataset:
        wanted = resolve_config({}, overrides={"dataset": name, **config})
        return load_dataset(wanted, datasets_dir=settings.datasets_dir, cache_dir=Path("none"))

    return read_it


def test_all_grids_of_a_users_data_are_used_unless_a_job_says_how_many() -> None:
    assert TrainingConfig().num_samples == TrainingConfig(dataset="arc").num_samples == 100_000
    assert TrainingConfig(dataset="mine").num_samples is None
    assert TrainingConfig(dataset="mine", num_samples=500).num_samples == 500
    # A preset that names the data has the last word, whatever the request's own default was.
    assert resolve_config({"dataset": "mine"}).num_samples is None
    assert resolve_config({"dataset": "mine"}, overrides={"dataset": "arc"}).num_samples == 100_000


def test_stored_jobs_keep_what_they_use_and_their_identity() -> None:
    stored = {"dataset": "mine", "num_samples": 100_000}
    config = read_config(stored)
    assert config.num_samples == 100_000
    others = [TrainingConfig(dataset="mine"), TrainingConfig(dataset="mine", num_samples=500)]
    identities = {compute_config_sha256(each, dataset_sha256="x") for each in [config, *others]}
    assert len(identities) == 3  # they may use other grids
    assert read_config({"dataset": "of a later version", "num_samples": None}).dataset
    assert read_config({"dataset": "mine", "num_samples": None, "new": 1}).num_samples is None


@pytest.mark.parametrize("dataset", ["atomic", "arc"])
def test_no_number_is_the_default_for_data_of_our_own(client: TestClient, dataset: str) -> None:
    body = {"option": "b", "dataset": dataset, "num_samples": None}
    answer = client.post("/jobs", json=body).raise_for_status()
    assert answer.json()["config"]["num_samples"] == 100_000


def test_number_is_a_sample_from_all_over_the_file(load: Callable[..., Dataset]) -> None:
    part = load(num_samples=100)
    assert [len(split) for split in (part.train, part.val, part.test)] == [80, 10, 10]
    assert 20 < (part.train == 1).all((1, 2)).sum() < 60
    assert part.num_available == {"train": 200, "val": 60, "test": 60}
    again, other = load(num_samples=100), load(num_samples=100, data_seed=7)
    assert part.compute_sha256() == again.compute_sha256() != other.compute_sha256()


def test_whole_file_is_the_same_for_each_seed_and_each_way_to_say_it(
    load: Callable[..., Dataset],
) -> None:
    whole = load()
    assert len(whole.train) == 200
    assert whole.num_available is None
    for config in ({"seed": 7}, {"num_samples": 100_000}):
        assert load(**config).compute_sha256() == whole.compute_sha256()


def test_job_says_how_many_grids_of_how_many_it_uses(
    client: TestClient,
    settings: Settings,
    engine: Engine,
    submit_job: SubmitJob,
    write_npz: Callable[..., str],
) -> None:
    grids = np.random.default_rng(0).integers(0, 10, (400, 8, 8), dtype=np.uint8)
    name = write_npz(images=grids)
    part = submit_job(**TINY | {"dataset": name, "num_samples": 100, "epochs": 1})
    whole = client.post(
        "/jobs", json={"option": "a", "dataset": name, "epochs": 1, "batch_size": 64}
    ).json()
    assert whole["config"]["num_samples"] is None
    drain(settings, engine)
    message = "used are 80 of 320 training grids, 10 of 40 validation grids, 10 of 40 test grids"
    assert any(message in each for each in read_warnings(engine, part.id))
    assert not any("used are" in each for each in read_warnings(engine, whole["id"]))
    summary = read(engine, part).dataset_summary or {}
    assert summary["num_available"] == {"train": 320, "val": 40, "test": 40}
    assert "80 of 320 used" in client.get(f"/ui/jobs/{part.id}").text
    done = client.get(f"/jobs/{whole['id']}").json()
    assert (done["status"], done["dataset_summary"]["num_train"]) == ("succeeded", 320)
    # The form of a new job and an estimate for a study can do without a number, too.
    assert client.get("/ui/jobs/new", params={"dataset": name}).status_code == 200
    plan = client.post(
        "/studies?dry_run=true", json={"options": ["a", "b"], "config": {"dataset": name}}
    )
    assert plan.status_code in (200, 201), plan.text


def read_warnings(engine: Engine, job_id: str) -> list[str]:
    with Session(engine) as session:
        events = select(JobEvent).where(
            JobEvent.job_id == job_id, JobEvent.kind == EventKind.warning
        )
        return [event.message for event in session.exec(events)]
