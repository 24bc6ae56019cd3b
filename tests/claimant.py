"""Claims and finishes jobs until none waits, as fast as the database allows.

It says `ready` once the database is open and begins when its standard input ends, so that
several start to compete at once. Then it prints id and attempt of each job that it claimed.
"""

import os
import sys

from sqlalchemy import Engine
from sqlmodel import Session

from server.database.engine import open_database
from server.jobs import admission, queue
from server.jobs.leases import Lease
from server.models.tables import Job
from server.settings import Settings


def main() -> None:
    settings = Settings()
    engine = open_database(settings)
    say("ready")
    sys.stdin.read()
    worker_id = f"claimant/{os.getpid()}"
    while is_any_queued(engine):
        job = queue.claim(engine, worker_id=worker_id, lease_seconds=settings.lease_seconds)
        if job is not None:
            finish(engine, job, worker_id=worker_id)
            say(f"{job.id} {job.attempt}")
    engine.dispose()


def is_any_queued(engine: Engine) -> bool:
    with Session(engine) as session:
        return admission.count_queued(session) > 0


def finish(engine: Engine, job: Job, *, worker_id: str) -> None:
    queue.finish(engine, Lease(job.id, job.attempt, worker_id), test_metrics={})


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
