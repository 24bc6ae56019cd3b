"""Many processes that claim from one queue, on both databases."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import forks
import pytest
from conftest import BOTH_DATABASES
from fault_worker import wait_for
from forks import Fork
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from server.database.engine import write_transaction
from server.jobs.submission import new_job, submit_job
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Job, JobEvent, JobStatus
from server.settings import Settings

pytestmark = [BOTH_DATABASES, pytest.mark.slow]

NUM_PROCESSES = 8
NUM_JOBS = 1000
LONGEST_WAIT_SECONDS = 120


@dataclass(frozen=True)
class Claimant:
    """A process that competes once its standard input ends."""

    process: Fork
    stdin: IO[str]
    output: Path


@contextmanager
def claimant(settings: Settings, *, output: Path) -> Iterator[Claimant]:
    """The process does not outlive its block."""
    environment = os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_DATABASE_URL": settings.database_url,
    }
    read_end, write_end = os.pipe()
    with open(write_end, "w") as stdin, output.open("w") as log:
        with open(read_end) as theirs:
            process = forks.start(
                "claimant", environment=environment, stdin=theirs, stdout=log, stderr=log
            )
        try:
            yield Claimant(process, stdin, output)
        finally:
            process.kill()
            process.wait()


def submit_jobs(engine: Engine) -> list[str]:
    """In one transaction; returns their ids in order."""
    config = resolve_config(OPTIONS[BuiltInOption.b].config, overrides={})
    with write_transaction(engine) as session:
        jobs = [
            submit_job(session, new_job(config, option=BuiltInOption.b)) for _ in range(NUM_JOBS)
        ]
        return sorted(job.id for job in jobs)


def start_together(claimants: list[Claimant]) -> None:
    for each in claimants:
        wait_for(lambda each=each: each.output.read_text() == "ready\n")
    for each in claimants:
        each.stdin.close()


def read_claims(claimant: Claimant) -> list[tuple[str, int]]:
    """The id and the attempt of each job that it claimed, once it has ended."""
    assert claimant.process.wait(timeout=LONGEST_WAIT_SECONDS) == 0, claimant.output.read_text()
    _, *lines = claimant.output.read_text().splitlines()
    return [(job_id, int(attempt)) for job_id, attempt in map(str.split, lines)]


def read_events(engine: Engine) -> dict[str, list[str]]:
    """The kinds of each job's events, oldest first."""
    kinds: dict[str, list[str]] = {}
    with Session(engine) as session:
        for event in session.exec(select(JobEvent).order_by(col(JobEvent.id))):
            kinds.setdefault(event.job_id, []).append(event.kind)
    return kinds


def test_competing_processes_run_every_job_exactly_once(
    settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    submitted = submit_jobs(engine)
    with ExitStack() as stack:
        claimants = [
            stack.enter_context(claimant(settings, output=tmp_path / str(number)))
            for number in range(NUM_PROCESSES)
        ]
        start_together(claimants)
        claims = [read_claims(process) for process in claimants]
    assert sum(bool(claimed) for claimed in claims) > 1, "nobody competed"
    assert sorted(chain.from_iterable(claims)) == [(job_id, 1) for job_id in submitted]
    with Session(engine) as session:
        ended = set(session.exec(select(Job.status, Job.attempt)))
    assert ended == {(JobStatus.succeeded, 1)}
    expected = ["queued", "running", "succeeded"]
    assert read_events(engine) == dict.fromkeys(submitted, expected)
