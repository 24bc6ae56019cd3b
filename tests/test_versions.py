"""Databases and jobs of other versions: refused in one line, or shown like all others."""

import re
from typing import Any

import forks
import pytest
from commands import assert_one_line, make_environment
from conftest import BOTH_DATABASES, SubmitJob, drain, open_client, problem, read
from hypothesis import given
from hypothesis import strategies as st
from known_job import make_epoch
from sqlalchemy import Engine, inspect, text
from sqlmodel import Session

from server.database.engine import open_database, write_transaction
from server.database.schema import SchemaError
from server.jobs import queue, records
from server.jobs.leases import Lease
from server.main import create_app
from server.models.configuration import (
    StoredConfigError,
    TrainingConfig,
    check_config,
    fill_in,
    read_config,
)
from server.models.tables import Job, JobStatus
from server.settings import Settings

#: Settings and values that this version does not know.
CHANGES: list[dict[str, Any]] = [
    {"warmup_steps": 10},
    {"batch_size": 8192},
    {"class_weighting": "cube_root"},
    {"epochs": 5000, "nested": {"loss": ["a", {"b": None}]}},
    {"beta": None, "latent_dim": "ten", "use_focal_loss": 3},
    {"data_seed": -1, "seed": -1},
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
STORED_CONFIGS = st.dictionaries(
    st.sampled_from(sorted(TrainingConfig.model_fields)) | st.text(), JSON_VALUES
)


@given(STORED_CONFIGS)
def test_any_stored_configuration_can_be_read(stored: dict[str, Any]) -> None:
    config = read_config(stored)
    for name, default in TrainingConfig():
        value = getattr(config, name)
        assert isinstance(value, int | float if isinstance(default, float) else type(default) | str)
    assert fill_in(stored).keys() == {*TrainingConfig.model_fields, *stored}
    assert {name: fill_in(stored)[name] for name in stored} == stored


@given(STORED_CONFIGS)
def test_configuration_is_trained_with_only_as_it_was_stored(stored: dict[str, Any]) -> None:
    try:
        config = check_config(stored)
    except StoredConfigError as error:
        assert any(name in str(error) for name in stored)
    else:
        assert config == read_config(stored)


@pytest.fixture(params=CHANGES, ids=lambda change: ",".join(change))
def foreign_job(request: pytest.FixtureRequest, engine: Engine, submit_job: SubmitJob) -> Job:
    """A queued job with an epoch, as another version would have stored it."""
    job = submit_job(epochs=3)
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=600, job_id=job.id)
    assert claimed is not None
    lease = Lease(claimed.id, claimed.attempt, "w1")
    metrics = make_epoch(lease, 1)
    metrics.val_kl_per_dimension = metrics.val_information_per_dimension = [0.1] * 10
    records.record_epoch(
        engine, lease, metrics, publish=list, resume_point=None, best_by=(), progress=0.3
    )
    queue.hand_back(engine, lease, reason="the worker stops")
    with write_transaction(engine) as session:
        stored = session.get_one(Job, job.id)
        stored.config = stored.config | request.param
    return stored


@BOTH_DATABASES
def test_every_list_and_page_shows_it(
    settings: Settings, foreign_job: Job, submit_job: SubmitJob
) -> None:
    other = submit_job()
    with open_client(create_app(settings)) as client:
        url = f"/jobs/{foreign_job.id}"
        for path in (
            "/jobs", "/", url, f"{url}/verdict", f"{url}/verdict?criteria=evidence",
            f"{url}/metrics", f"{url}/events", f"/ui{url}", "/metrics",
            f"/comparisons?job_id={foreign_job.id}&job_id={other.id}",
            f"/comparisons/report.html?job_id={foreign_job.id}&job_id={other.id}",
            f"/ui/compare?job_id={foreign_job.id}&job_id={other.id}",
        ):  # fmt: skip
            answer = client.get(path)
            assert answer.status_code == 200, (path, answer.text)
        shown = client.get(url).json()["config"]
    assert shown == fill_in(foreign_job.config)


@BOTH_DATABASES
def test_it_is_not_trained_and_says_why(
    settings: Settings, engine: Engine, foreign_job: Job
) -> None:
    drain(settings, engine)
    with open_client(create_app(settings)) as client:
        job = client.get(f"/jobs/{foreign_job.id}").json()
        assert (job["status"], job["failure_kind"]) == ("failed", "user")
        assert job["error"]["code"] == "unknown_config"
        assert "another version of Losslab stored this configuration" in job["error"]["message"]
        assert job["attempt"] == 2
        refused = problem(client.post(f"/jobs/{foreign_job.id}/resume"), 409)
        assert "another version" in refused["detail"]


@BOTH_DATABASES
def test_words_of_a_later_version_are_shown_as_they_are(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    with Session(engine) as session:
        session.execute(text("UPDATE job SET option = 'z'"))
        session.execute(text("UPDATE job_event SET kind = 'teleported'"))
        session.commit()
    with open_client(create_app(settings)) as client:
        assert client.get(f"/jobs/{job.id}").json()["option"] == "z"
        (event,) = client.get(f"/jobs/{job.id}/events").json()["data"]
        assert event["kind"] == "teleported"
        for path in ("/", "/jobs", f"/ui/jobs/{job.id}", f"/jobs/{job.id}/verdict", "/options"):
            answer = client.get(path)
            assert answer.status_code == 200, (path, answer.text)


#: What may be in the place of this version's number, and what is said of it.
FOREIGN_SCHEMAS = {
    "UPDATE alembic_version SET version_num = '9999'": "of a newer Losslab (schema 9999",
    "UPDATE alembic_version SET version_num = 'ae1027a6acf'": "of another program (schema",
    "DELETE FROM alembic_version": "no schema version",
    "DROP TABLE alembic_version": "no schema version",
}


@BOTH_DATABASES
@pytest.mark.parametrize(("statement", "words"), FOREIGN_SCHEMAS.items(), ids=str)
def test_database_with_another_schema_is_refused_and_not_changed(
    settings: Settings, engine: Engine, statement: str, words: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))
        tables = inspect(connection).get_table_names()
    with pytest.raises(SchemaError, match=re.escape(words)) as refusal:
        open_database(settings)
    assert len(str(refusal.value).splitlines()) == 1
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == tables


@BOTH_DATABASES
def test_worker_that_is_older_than_the_schema_takes_no_job(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    """The server was started with a newer version while the worker ran."""
    job = submit_job()
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaError, match="start it again with the version"):
        drain(settings, engine)
    assert read(engine, job).status == JobStatus.queued


@BOTH_DATABASES
def test_server_that_is_older_than_the_schema_is_not_ready(
    settings: Settings, engine: Engine
) -> None:
    settings.data_dir.mkdir(exist_ok=True)
    with open_client(create_app(settings)) as client:
        assert client.get("/readyz").status_code == 200
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        assert client.get("/readyz").status_code == 503


@pytest.mark.parametrize(
    "command", ["serve", "up", "worker --drain", "worker --check", "train --option b"]
)
def test_command_on_a_newer_database_says_so_in_one_line(
    settings: Settings, engine: Engine, command: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    done = forks.run(
        "losslab",
        *command.split(),
        environment=make_environment(LOSSLAB_DATA_DIR=str(settings.data_dir)),
    )
    assert_one_line(done, code=1, words="the database is of a newer Losslab (schema 9999")
