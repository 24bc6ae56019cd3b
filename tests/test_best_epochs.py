"""The best epoch of a job: by its own loss, and by the likelihood that is the same for all."""

import pytest
from conftest import (
    BOTH_DATABASES,
    SubmitJob,
    drain,
    open_client,
    problem,
    read,
    read_artifacts,
    read_rows,
)
from known_job import make_checkpoint, make_epoch
from sqlalchemy import Engine
from sqlmodel import Session

from server.files.artifacts import JobFiles
from server.jobs import queue, records
from server.jobs.leases import Lease
from server.main import create_app
from server.models.epochs import EpochMetrics
from server.models.tables import ArtifactKind, BestBy, Job
from server.settings import Settings

pytestmark = BOTH_DATABASES

LOSS, LIKELIHOOD = BestBy.loss, BestBy.likelihood


def record(engine: Engine, lease: Lease, epoch: int, *best_by: BestBy, likelihood: float) -> None:
    """An epoch with a checkpoint, whose loss falls with its number."""
    row = make_epoch(lease, epoch)
    row.val_recon_loss, row.val_log_likelihood = 1 / epoch, likelihood
    records.record_epoch(
        engine,
        lease,
        row,
        publish=lambda: [make_checkpoint(lease, epoch)],
        resume_point=None,
        best_by=best_by,
        progress=0.0,
    )


def list_checkpoints(engine: Engine, job: Job) -> list[int]:
    return [checkpoint.epoch for checkpoint in records.read_checkpoints(engine, job.id)]


def list_best_first(engine: Engine, job: Job, by: BestBy) -> list[int]:
    rows = records.read_checkpoints_best_first(engine, job.id, by=by)
    return [checkpoint.epoch for checkpoint in rows]


@pytest.fixture
def lease(engine: Engine, submit_job: SubmitJob) -> Lease:
    """Of a job that keeps every tenth checkpoint."""
    job = submit_job(epochs=50, checkpoint_every=10)
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=600, job_id=job.id)
    assert claimed is not None
    return Lease(claimed.id, claimed.attempt, "w1")


def test_checkpoint_stays_while_its_epoch_is_the_best_by_anything(
    engine: Engine, lease: Lease
) -> None:
    with Session(engine) as session:
        job = session.get_one(Job, lease.job_id)
    record(engine, lease, 1, LOSS, LIKELIHOOD, likelihood=-1.0)
    record(engine, lease, 2, LOSS, likelihood=-2.0)
    assert list_checkpoints(engine, job) == [1, 2]  # 1 is the best by likelihood
    record(engine, lease, 3, LOSS, likelihood=-2.0)
    assert list_checkpoints(engine, job) == [1, 3]
    record(engine, lease, 4, LIKELIHOOD, likelihood=-0.5)
    assert list_checkpoints(engine, job) == [3, 4]
    record(engine, lease, 10, LOSS, LIKELIHOOD, likelihood=-0.4)
    record(engine, lease, 11, LOSS, LIKELIHOOD, likelihood=-0.3)
    assert list_checkpoints(engine, job) == [10, 11]  # 10 is a scheduled one
    row = read(engine, job)
    assert (row.best_epoch, row.best_val_recon_loss) == (11, 1 / 11)
    assert (row.best_likelihood_epoch, row.best_val_log_likelihood) == (11, -0.3)


def test_checkpoints_are_read_best_first_by_either(engine: Engine, lease: Lease) -> None:
    for epoch, likelihood in ((10, -3.0), (20, -1.0), (30, -2.0)):
        record(engine, lease, epoch, likelihood=likelihood)
    job = Job(id=lease.job_id, option="b", config={})
    assert list_best_first(engine, job, LOSS) == [30, 20, 10]
    assert list_best_first(engine, job, LIKELIHOOD) == [20, 30, 10]


def test_epochs_of_an_older_version_have_a_best_by_loss_alone(engine: Engine, lease: Lease) -> None:
    record(engine, lease, 10, LOSS, likelihood=-1.0)
    record(engine, lease, 20, LOSS, likelihood=-2.0)
    with Session(engine) as session:
        session.get_one(EpochMetrics, (lease.job_id, 10)).val_log_likelihood = None
        session.commit()
    job = Job(id=lease.job_id, option="b", config={})
    assert list_best_first(engine, job, LOSS) == [20, 10]
    assert list_best_first(engine, job, LIKELIHOOD) == [20]


@pytest.mark.parametrize("option", ["b", "c"])
def test_job_ends_with_the_test_metrics_of_both_bests(
    settings: Settings, engine: Engine, submit_job: SubmitJob, option: str
) -> None:
    submitted = submit_job(option, epochs=4, checkpoint_every=4)
    drain(settings, engine)
    job, rows = read(engine, submitted), read_rows(engine, submitted)
    best = max(rows, key=lambda row: row.val_log_likelihood or -10.0)
    assert job.best_likelihood_epoch == best.epoch
    assert job.best_val_log_likelihood == best.val_log_likelihood
    kept = {a.epoch for a in read_artifacts(engine, job) if a.kind == ArtifactKind.checkpoint}
    assert kept == {4, job.best_epoch, job.best_likelihood_epoch}
    assert job.test_metrics is not None
    assert job.likelihood_test_metrics is not None
    is_same = job.best_epoch == job.best_likelihood_epoch
    assert (job.test_metrics == job.likelihood_test_metrics) == is_same
    # The test split's grids are like those of validation.
    measured = job.likelihood_test_metrics["log_likelihood"]
    assert measured == pytest.approx(best.val_log_likelihood, abs=0.1)
    assert job.likelihood_test_metrics["mutual_information"] is not None


def test_best_epochs_are_the_best_again_when_a_job_starts_over(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = submit_job("c", epochs=4, checkpoint_every=4)
    drain(settings, engine)
    before = read(engine, submitted)
    files = JobFiles(settings.runs_dir, submitted.id)
    for path in files.checkpoints_dir.glob("*.safetensors"):
        path.unlink()
    with Session(engine) as session:
        queue.enqueue(session, session.get_one(Job, submitted.id), message="its files are lost")
        session.commit()
    drain(settings, engine)
    after = read(engine, submitted)
    assert after.best_epochs == before.best_epochs
    assert after.test_metrics == before.test_metrics
    assert after.likelihood_test_metrics == before.likelihood_test_metrics
    for checkpoint in records.read_checkpoints(engine, submitted.id):
        files.verified_path(checkpoint.file_name, sha256=checkpoint.sha256)
    assert set(list_checkpoints(engine, submitted)) == {4, *after.best_epochs.values()}


def test_best_files_are_served_by_loss_or_by_likelihood(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job("b", epochs=3)
    drain(settings, engine)
    with Session(engine) as session:
        row = session.get_one(Job, job.id)
        row.best_epoch, row.best_likelihood_epoch = 1, 2
        session.commit()
    with open_client(create_app(settings)) as client:
        base = f"/jobs/{job.id}"
        for name, numbered in (
            ("checkpoints/best", "checkpoints/{}"),
            ("reconstructions/best.png", "reconstructions/{}.png"),
        ):
            by_default = client.get(f"{base}/{name}").content
            by_loss = client.get(f"{base}/{name}", params={"by": "loss"}).content
            by_likelihood = client.get(f"{base}/{name}", params={"by": "likelihood"}).content
            assert by_default == by_loss == client.get(f"{base}/{numbered.format(1)}").content
            assert by_likelihood == client.get(f"{base}/{numbered.format(2)}").content
        for name in ("checkpoints", "reconstructions"):
            entries = client.get(f"{base}/{name}").json()["data"]
            assert [entry["is_best"] for entry in entries] == [True, False, False]
            assert [entry["is_best_by_likelihood"] for entry in entries] == [False, True, False]
        shown = client.get(base).json()
        assert (shown["best_epoch"], shown["best_likelihood_epoch"]) == (1, 2)
        answer = problem(client.get(f"{base}/checkpoints/best", params={"by": "x"}), 422)
        assert "loss" in str(answer["errors"])
        assert "likelihood" in str(answer["errors"])


def test_job_without_a_best_by_likelihood_says_which_epochs_there_are(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job("b", epochs=2)
    drain(settings, engine)
    with Session(engine) as session:
        session.get_one(Job, job.id).best_likelihood_epoch = None
        session.commit()
    with open_client(create_app(settings)) as client:
        best = client.get(f"/jobs/{job.id}/checkpoints/best", params={"by": "likelihood"})
        assert "there are best, latest and 1, 2" in problem(best, 404)["detail"]
