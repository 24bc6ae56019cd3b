"""The identity of a configuration: which jobs differ only in their seeds and checkpoints."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import BOTH_DATABASES, TINY, SubmitJob, drain, read
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from server.files.hashes import compute_sha256
from server.models.configuration import (
    EARLIER_VALUES,
    TrainingConfig,
    compute_config_sha256,
    read_config,
    resolve_config,
)
from server.models.options import OPTIONS, BetaSchedule, BuiltInOption, ClassWeighting
from server.settings import Settings

OWN = {"Sec-Fetch-Site": "same-origin"}
#: Option b as it was before there were `EARLIER_VALUES`. A setting that is added later belongs
#: there, with the value that all jobs had, so that stored jobs keep their identity.
CANONICAL = (
    '{"augment":true,"batch_size":128,"beta":1.0,"beta_schedule":"linear_warmup",'
    '"beta_warmup_fraction":0.2,"class_weighting":"sqrt_inverse","dataset":"atomic","epochs":50,'
    '"focal_gamma":2.0,"free_bits":0.0,"latent_dim":10,"learning_rate":0.001,"max_grad_norm":1.0,'
    '"min_learning_rate":1e-05,"num_samples":100000,"use_focal_loss":true}'
)
#: Another value of each setting that is no number.
OTHER = {
    "dataset": "arc",
    "augment": False,
    "beta_schedule": BetaSchedule.constant,
    "class_weighting": ClassWeighting.inverse,
    "use_focal_loss": False,
}
SHA256 = "70ac0a89f30d19abf49b645e2eae434d7262cf0db6766ceaf2d09e0bc7db5938"


def post(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/jobs", json={"option": "b", **TINY, **body}).raise_for_status()
    job: dict[str, Any] = answer.json()
    return job


def compute_by_hand(config: dict[str, Any], **changes: Any) -> str:
    kept = {
        key: value
        for key, value in (config | changes).items()
        if key not in ("seed", "data_seed", "checkpoint_every")
        and EARLIER_VALUES.get(key, ...) != value
    }
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_identity_is_the_hash_of_the_canonical_json() -> None:
    assert hashlib.sha256(CANONICAL.encode()).hexdigest() == SHA256
    config = resolve_config(OPTIONS[BuiltInOption.b].config, overrides={"generator": 1})
    assert compute_config_sha256(config) == SHA256
    of_file = hashlib.sha256(CANONICAL.replace("atomic", "ab" * 32).encode()).hexdigest()
    assert compute_config_sha256(config, dataset_sha256="ab" * 32) == of_file


def test_settings_that_came_later_count_only_with_another_value() -> None:
    stored = {"class_weighting": "sqrt_inverse"}
    assert compute_config_sha256(read_config(stored)) == SHA256
    config = read_config(stored | {"generator": 2, "effective_number_beta": 0.5})
    canonical = CANONICAL.replace('"epochs"', '"effective_number_beta":0.5,"epochs"')
    canonical = canonical.replace('"latent_dim"', '"generator":2,"latent_dim"')
    assert compute_config_sha256(config) == hashlib.sha256(canonical.encode()).hexdigest()
    assert resolve_config({}).generator == 2


@pytest.mark.parametrize("name", TrainingConfig.model_fields)
def test_every_setting_but_seeds_and_checkpoints_belongs_to_the_identity(name: str) -> None:
    base = TrainingConfig()
    changed = base.model_copy(update={name: OTHER.get(name, 3)})
    assert getattr(changed, name) != getattr(base, name)
    is_same = compute_config_sha256(changed) == compute_config_sha256(base)
    assert is_same == (name in ("seed", "data_seed", "checkpoint_every"))


@BOTH_DATABASES
def test_job_has_the_identity_of_its_whole_configuration(client: TestClient) -> None:
    job = post(client)
    assert job["config_sha256"] == compute_by_hand(job["config"])
    assert job["config_sha256"] == post(client, seed=7, checkpoint_every=5)["config_sha256"]
    assert job["config_sha256"] == post(client, data_seed=7, beta=1)["config_sha256"]
    assert job["config_sha256"] != post(client, beta=1.5)["config_sha256"]
    # The name of an option is none of its settings.
    a_like_b = post(client, option="a", class_weighting="sqrt_inverse")
    assert job["config_sha256"] == a_like_b["config_sha256"]


@BOTH_DATABASES
def test_uploaded_data_set_is_known_by_its_file_and_not_by_its_name(
    client: TestClient, settings: Settings, write_npz: Callable[..., str]
) -> None:
    grids = np.random.default_rng(0).integers(0, 10, (40, 8, 8), dtype=np.uint8)
    write_npz("mine", images=grids)
    path = settings.datasets_dir / "mine.npz"
    (settings.datasets_dir / "yours.npz").write_bytes(path.read_bytes())
    mine, yours = (post(client, dataset=name) for name in ("mine", "yours"))
    assert mine["config"]["dataset"] == "mine"
    assert mine["config_sha256"] == yours["config_sha256"]
    assert mine["config_sha256"] == compute_by_hand(mine["config"], dataset=compute_sha256(path))
    write_npz("mine", images=grids[1:])
    assert post(client, dataset="mine")["config_sha256"] != mine["config_sha256"]


@pytest.fixture
def extend(client: TestClient) -> dict[str, Callable[[str], Any]]:
    """The ways to give a job three epochs."""
    return {
        "api": lambda job_id: client.post(f"/jobs/{job_id}/resume", json={"epochs": 3}),
        "page": lambda job_id: client.post(
            f"/ui/jobs/{job_id}/resume", data={"epochs": "3"}, headers=OWN
        ),
    }


@BOTH_DATABASES
@pytest.mark.parametrize("way", ["api", "page"])
def test_job_with_more_epochs_has_the_identity_of_a_longer_job(
    client: TestClient,
    settings: Settings,
    engine: Engine,
    write_npz: Callable[..., str],
    extend: dict[str, Callable[[str], Any]],
    way: str,
) -> None:
    name = write_npz(images=np.random.default_rng(0).integers(0, 10, (40, 8, 8), dtype=np.uint8))
    short = post(client, epochs=1, dataset=name)
    drain(settings, engine)
    extend[way](short["id"]).raise_for_status()
    extended = client.get(f"/jobs/{short['id']}").json()
    assert extended["config"]["epochs"] == 3
    assert extended["config_sha256"] == post(client, epochs=3, dataset=name)["config_sha256"]
    assert extended["config_sha256"] != short["config_sha256"]


@BOTH_DATABASES
def test_job_that_only_goes_on_keeps_its_identity(client: TestClient) -> None:
    job = post(client)
    for action in ("pause", "resume"):
        client.post(f"/jobs/{job['id']}/{action}").raise_for_status()
    assert client.get(f"/jobs/{job['id']}").json()["config_sha256"] == job["config_sha256"]


@BOTH_DATABASES
def test_same_data_and_other_weights_come_from_the_two_seeds(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    jobs = [submit_job(seed=seed, data_seed=3, epochs=1) for seed in (1, 2)]
    other = submit_job(seed=1, epochs=1)
    drain(settings, engine)
    first, second, third = (read(engine, job) for job in (*jobs, other))
    summaries = [job.dataset_summary or {} for job in (first, second, third)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["sha256"] != summaries[2]["sha256"]
    assert first.train_loss != second.train_loss
    assert first.config_sha256 == second.config_sha256 == third.config_sha256
    # The generated grids of seeds 3 and 1 are each kept once.
    assert len(list(settings.cache_dir.iterdir())) == 2
