"""Epochs that are read as plain values equal the written epochs."""

from conftest import BOTH_DATABASES, SubmitJob, drain, read, read_rows
from sqlalchemy import Engine
from sqlmodel import Session

from server.judging.histories import EpochSummary, read_histories
from server.judging.verdicts import judge
from server.settings import Settings

pytestmark = BOTH_DATABASES


def test_history_has_what_a_verdict_needs(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    jobs = [submit_job("a", epochs=3), submit_job("b"), submit_job("c", latent_dim=3)]
    drain(settings, engine)
    with Session(engine) as session:
        histories = read_histories(session, [job.id for job in jobs])
    for job in jobs:
        rows = read_rows(engine, job)
        assert len(rows) == job.training_config.epochs
        history = histories[job.id]
        assert [epoch._asdict() for epoch in history] == [
            {name: getattr(row, name) for name in EpochSummary._fields} for row in rows
        ]
        assert judge(read(engine, job), history) == judge(read(engine, job), rows)


def test_history_of_a_job_that_has_not_begun_is_empty(
    engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    with Session(engine) as session:
        assert read_histories(session, [job.id]) == {job.id: []}
        assert read_histories(session, []) == {}
