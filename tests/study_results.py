"""Studies with stored results, made without training."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

from artificial_runs import MEASURED
from fastapi.testclient import TestClient
from sqlalchemy import Engine, delete, func, insert, select, update
from sqlmodel import Session, col
from statements import recording

from server.api.study_requests import StudyRequest
from server.database.engine import write_transaction
from server.jobs import seeds, studies
from server.judging.studies import ResultCache, StudyVerdict, judge_study
from server.models.columns import utc_now
from server.models.epochs import EpochMetrics
from server.models.studies import Study, StudyJob
from server.models.tables import FailureKind, Job, JobStatus
from server.settings import Settings

#: How a seed ends, by a letter: `end_seeds(..., {"b": "ppf"})`.
ENDINGS: Final[dict[str, dict[str, Any]]] = {
    "p": {"status": JobStatus.succeeded},  # passes
    "f": {"status": JobStatus.succeeded},  # all black
    "n": {"status": JobStatus.failed, "failure_kind": FailureKind.numeric},
    "o": {"status": JobStatus.failed, "failure_kind": FailureKind.oom},
    "u": {"status": JobStatus.failed, "failure_kind": FailureKind.user},
    "t": {"status": JobStatus.failed, "failure_kind": FailureKind.timeout},
    "i": {"status": JobStatus.failed, "failure_kind": FailureKind.infrastructure},
    "c": {"status": JobStatus.cancelled},
}
#: At five seeds b is decided.
PASSING: Final = {"a": "fffff", "b": "ppppp"}
NUM_EPOCHS: Final = 3
QUICK: Final = {"epochs": NUM_EPOCHS, "num_samples": 200}
FIRST_END: Final = utc_now() - timedelta(days=1)

Json = dict[str, Any]


def make_epochs(job_id: str, *, is_healthy: bool) -> list[dict[str, Any]]:
    """The epochs of a run that passes every criterion, or of one that paints all black although it
    knows as much."""
    return [
        {
            "job_id": job_id,
            "epoch": epoch,
            "attempt": 1,
            "recorded_at": FIRST_END,
            "seconds": 1.0,
            "grids_per_second": 200.0,
            "beta": 1.0,
            "learning_rate": 1e-3,
            "num_loss_spikes": 0,
            "max_spike_ratio": 1.1,
            **{
                f"{split}_{name}": value
                for split in ("train", "val")
                for name, value in _measure(epoch, is_healthy=is_healthy).items()
            },
            **MEASURED,
            "val_active_units_variance": 10,
        }
        for epoch in range(1, NUM_EPOCHS + 1)
    ]


def _measure(epoch: int, *, is_healthy: bool) -> dict[str, Any]:
    share = 1.0 if is_healthy else 0.0
    return {
        "loss": 1.1 / (epoch + 9) * 10,
        "recon_loss": 1.0 / (epoch + 9) * 10,
        "kl_loss": 0.1 / (epoch + 9) * 10,
        "pixel_accuracy": 0.8 + 0.01 * epoch,
        "foreground_recall": 0.6 * share,
        "foreground_iou": 0.2 * share,
        "balanced_accuracy": 0.5,
        "background_share": 0.9 if is_healthy else 1.0,
        "all_black_share": 1 - share,
        "exact_grid_rate": 0.0,
        "recall_per_colour": [0.5] * 10,
        "kl_per_dimension": [0.5] * 10,
        "active_units": 10,
    }


def submit_study(engine: Engine, settings: Settings, **body: Any) -> str:
    """Store a study and its jobs, as `POST /studies` does; returns its id."""
    request = StudyRequest.model_validate({"options": ["a", "b"], "config": QUICK, **body})
    with write_transaction(engine) as session:
        study = request.make_study(session, datasets_dir=settings.datasets_dir)
        return seeds.submit_study(session, study, seeds=request.list_seeds()).id


def end_seeds(engine: Engine, study_id: str, endings: Mapping[str, str], *, first: int = 0) -> None:
    """End the jobs of each arm in the order of their seeds, each as its letter of `ENDINGS` says.

    `q` leaves a job queued, `r` lets it run, and `d` deletes it.
    """
    with engine.begin() as connection:
        arms = [arm["name"] for arm in read_study(engine, study_id).arms]
        for arm, letters in endings.items():
            ids = read_job_ids(engine, study_id, arms.index(arm))
            for place, letter in enumerate(letters, first):
                _end(connection, ids[place], letter, place=place)


def _end(connection: Any, job_id: str | None, letter: str, *, place: int) -> None:
    assert job_id is not None
    this = col(Job.id) == job_id
    if letter == "d":
        connection.execute(delete(Job).where(this))
    elif letter == "r":
        running = {"status": JobStatus.running, "progress": 0.5, "started_at": FIRST_END}
        connection.execute(update(Job).where(this).values(running))
    elif letter != "q":
        ended_at = FIRST_END + timedelta(minutes=place + 1)
        ending = {"started_at": FIRST_END, "ended_at": ended_at, "attempt": 1, "progress": 1.0}
        ending["epochs_completed"] = NUM_EPOCHS
        connection.execute(update(Job).where(this).values({**ending, **ENDINGS[letter]}))
        connection.execute(delete(EpochMetrics).where(col(EpochMetrics.job_id) == job_id))
        rows = make_epochs(job_id, is_healthy=letter != "f")
        connection.execute(insert(EpochMetrics), rows)


def read_study(engine: Engine, study_id: str) -> Study:
    with Session(engine) as session:
        return session.get_one(Study, study_id)


def read_job_ids(engine: Engine, study_id: str, arm: int) -> list[str | None]:
    rows = select(col(StudyJob.job_id)).where(
        col(StudyJob.study_id) == study_id, col(StudyJob.arm) == arm
    )
    with Session(engine) as session:
        return list(session.scalars(rows.order_by(col(StudyJob.position))))


def judge(engine: Engine, study_id: str, *, cache: ResultCache | None = None) -> StudyVerdict:
    with Session(engine) as session:
        return judge_study(session, session.get_one(Study, study_id), cache=cache)


# -- by the API


def post(client: TestClient, *, key: str | None = None, **body: Any) -> Json:
    headers = {} if key is None else {"Idempotency-Key": key}
    request = {"options": ["a", "b"], "config": QUICK, **body}
    answer = client.post("/studies", json=request, headers=headers)
    assert answer.status_code == 201, answer.text
    study: Json = answer.json()
    assert answer.headers["location"] == f"/studies/{study['id']}"
    return study


def read(client: TestClient, study: Json | str, **query: Any) -> Json:
    study_id = study if isinstance(study, str) else study["id"]
    answer: Json = client.get(f"/studies/{study_id}", params=query).raise_for_status().json()
    return answer


def command(client: TestClient, study: Json, name: str, **body: Any) -> Json:
    answer = client.post(f"/studies/{study['id']}/{name}", json=body or None)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def count(engine: Engine, table: type = Job) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def read_statuses(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.execute(select(col(Job.status))).scalars())


def count_statements(engine: Engine, execute: Callable[[], object]) -> int:
    """How often the database is asked."""
    with recording(engine) as statements:
        execute()
    return sum(not each.text.startswith("BEGIN") for each in statements)


def list_studies(engine: Engine) -> list[Study]:
    with Session(engine) as session:
        return list(session.scalars(select(Study)))


def run(engine: Engine, change: studies.Command, study_id: str) -> Study:
    with write_transaction(engine) as session:
        return change(session, study_id)
