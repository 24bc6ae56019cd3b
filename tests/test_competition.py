"""Many processes that claim from one queue, on both databases."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

from conftest import BOTH_DATABASES, SubmitJob
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.models.tables import Job, JobEvent, JobStatus
from server.settings import Settings

pytestmark = BOTH_DATABASES

NUM_PROCESSES = 8
NUM_JOBS = 1000
LONGEST_WAIT_SECONDS = 120
CLAIMANT = Path(__file__).with_name("claimant.py")

Claimant = subprocess.Popen[str]


@contextmanager
def claimant(settings: Settings) -> Iterator[Claimant]:
    """A process that competes; it does not outlive its block."""
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_DATABASE_URL": settings.database_url,
    }
    process = subprocess.Popen(
        [sys.executable, str(CLAIMANT)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def start_together(claimants: list[Claimant]) -> None:
    for process in claimants:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in claimants:
        assert process.stdin is not None
        process.stdin.close()


def read_claims(process: Claimant) -> list[tuple[str, int]]:
    """The id and the attempt of each job that it claimed, once it has ended."""
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    assert process.wait(timeout=LONGEST_WAIT_SECONDS) == 0
    return [(job_id, int(attempt)) for job_id, attempt in map(str.split, lines)]


def read_events(engine: Engine) -> dict[str, list[str]]:
    """The kinds of each job's events, oldest first."""
    kinds: dict[str, list[str]] = {}
    with Session(engine) as session:
        for event in session.exec(select(JobEvent).order_by(col(JobEvent.id))):
            kinds.setdefault(event.job_id, []).append(event.kind)
    return kinds


def test_competing_processes_run_every_job_exactly_once(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    submitted = sorted(submit_job().id for _ in range(NUM_JOBS))
    with ExitStack() as stack:
        claimants = [stack.enter_context(claimant(settings)) for _ in range(NUM_PROCESSES)]
        start_together(claimants)
        claims = [read_claims(process) for process in claimants]
    assert sum(bool(claimed) for claimed in claims) > 1, "nobody competed"
    assert sorted(chain.from_iterable(claims)) == [(job_id, 1) for job_id in submitted]
    with Session(engine) as session:
        ended = set(session.exec(select(Job.status, Job.attempt)))
    assert ended == {(JobStatus.succeeded, 1)}
    expected = ["queued", "running", "succeeded"]
    assert read_events(engine) == dict.fromkeys(submitted, expected)
