"""Epochs that are read as plain values equal the written epochs."""

import pytest
from artificial_runs import summarise
from conftest import BOTH_DATABASES, SubmitJob, drain, open_client, read, read_rows
from sqlalchemy import Engine
from sqlmodel import Session

from server.api.routes import jobs as jobs_routes
from server.judging import histories as histories_module
from server.judging.histories import read_histories, read_in_parts
from server.judging.verdicts import judge
from server.main import create_app
from server.settings import Settings

pytestmark = BOTH_DATABASES


def test_history_has_what_a_verdict_needs(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    jobs = [submit_job("a", epochs=3), submit_job("b"), submit_job("c", latent_dim=3)]
    drain(settings, engine)
    with Session(engine) as session:
        histories = read_histories(session, [job.id for job in jobs], has_kl_curves=True)
    for job in jobs:
        rows = read_rows(engine, job)
        assert len(rows) == job.training_config.epochs
        history = histories[job.id]
        assert [epoch._asdict() for epoch in history] == [
            summarise(row, is_last=row is rows[-1])._asdict() for row in rows
        ]
        assert judge(read(engine, job), history) == judge(read(engine, job), rows)


def test_history_of_a_job_that_has_not_begun_is_empty(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    with Session(engine) as session:
        assert read_histories(session, [job.id]) == {job.id: []}
        assert read_histories(session, []) == {}


def test_kl_before_the_last_epoch_is_read_for_curves_alone(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job("a", epochs=3)
    drain(settings, engine)
    with Session(engine) as session:
        epochs = read_histories(session, [job.id])[job.id]
    assert [len(epoch.val_kl_per_dimension) for epoch in epochs] == [0, 0, 10]
    assert [epoch.val_kl_total is None for epoch in epochs] == [True, True, False]


def test_curves_of_many_values_have_the_kl_of_some_epochs_and_the_rest_of_all(
    settings: Settings,
    engine: Engine,
    submit_job: SubmitJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [submit_job("a", epochs=7), submit_job("b", epochs=4)]
    drain(settings, engine)
    # Of the 110 values of both jobs a third.
    monkeypatch.setattr(histories_module, "MAX_KL_VALUES", 40)
    with Session(engine) as session:
        found = read_histories(session, [job.id for job in jobs], has_kl_curves=True)
    for job, expected in zip(jobs, ([1, 3, 6, 7], [1, 3, 4]), strict=True):
        rows = read_rows(engine, job)
        with_kl = [epoch for epoch in found[job.id] if epoch.val_kl_total is not None]
        assert [epoch.epoch for epoch in with_kl] == expected
        assert [epoch.val_kl_min for epoch in with_kl] == [
            min(row.val_kl_per_dimension) for row in rows if row.epoch in expected
        ]
        assert [epoch.train_loss for epoch in found[job.id]] == [row.train_loss for row in rows]


def test_long_histories_are_read_with_their_ends_and_each_nth_epoch(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job("a", epochs=8)
    drain(settings, engine)
    with Session(engine) as session:
        found = read_histories(session, [job.id], has_kl_curves=True, max_epochs=3)[job.id]
    assert [epoch.epoch for epoch in found] == [1, 3, 6, 8]
    assert all(epoch.val_kl_total is not None for epoch in found)


def test_jobs_read_in_parts_have_all_their_epochs(
    settings: Settings,
    engine: Engine,
    submit_job: SubmitJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [submit_job("a", epochs=epochs) for epochs in (2, 3, 1)]
    drain(settings, engine)
    monkeypatch.setattr(histories_module, "_MAX_EPOCHS_AT_ONCE", 3)
    with Session(engine) as session:
        found = list(read_in_parts(session, [read(engine, job) for job in jobs]))
    assert [(job.id, len(epochs)) for job, epochs in found] == [
        (job.id, num) for job, num in zip(jobs, (2, 3, 1), strict=True)
    ]


def test_metrics_of_a_long_job_are_sent_in_parts_and_whole(
    settings: Settings,
    engine: Engine,
    submit_job: SubmitJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = submit_job("a", epochs=4)
    drain(settings, engine)
    waiting = submit_job("b")
    with open_client(create_app(settings)) as client:
        whole = client.get(f"/jobs/{job.id}/metrics").raise_for_status().json()
        assert [row["epoch"] for row in whole["data"]] == [1, 2, 3, 4]
        for size in (1, 2, 3, 4, 5):
            monkeypatch.setattr(jobs_routes, "_NUM_EPOCHS_AT_ONCE", size)
            assert client.get(f"/jobs/{job.id}/metrics").json() == whole
        nothing = {"data": [], "has_more": False}
        assert client.get(f"/jobs/{waiting.id}/metrics").json() == nothing
