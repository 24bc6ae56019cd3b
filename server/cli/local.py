"""Runs without a running service: one job without a server, and the quickstart's three jobs.

Slow imports are inside the functions that need them, since the command line imports this module.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from server.cli.processes import (
    GRACE_SECONDS,
    Process,
    Service,
    StartError,
    StopSignal,
    check_worker_extra,
    start_worker,
    stop_processes,
)
from server.errors import ConflictError, InvalidInputError, NotFoundError
from server.models.options import BuiltInOption

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from server.api.requests import JobRequest
    from server.client import LosslabClient
    from server.settings import Settings

Json = dict[str, Any]
OnUpdate = Callable[[Json], None]

QUICKSTART_PRIORITY: Final = 100  # before other queued jobs in the same data directory

#: No other worker on the same data directory can claim the job while its own worker starts.
_RESERVED_SECONDS = 60.0
_POLL_SECONDS = 0.25
_CANCEL_SECONDS = 10.0
_OUTPUT_TAIL_BYTES = 2000


def train(settings: "Settings", request: Json, *, log: Path | None, on_update: OnUpdate) -> Json:
    """Run one job in its own worker; returns `job` and `verdict` in the API's form.

    A signal to stop cancels the job. Raises pydantic.ValidationError and InvalidInputError
    for invalid input, StartError if the worker died.
    """
    from server.api.requests import JobRequest  # noqa: PLC0415
    from server.database.engine import open_database  # noqa: PLC0415

    check_worker_extra()
    wanted = JobRequest.model_validate(request)
    if log is not None and not log.absolute().parent.is_dir():
        raise InvalidInputError(f"there is no folder {log.absolute().parent} for the log")
    if settings.wandb_project and find_spec("wandb") is None:
        raise InvalidInputError("wandb is not installed: pip install -e '.[wandb]', or --no-wandb")
    engine = open_database(settings)
    try:
        with StopSignal() as stop:
            return _run_job(
                engine, settings, wanted=wanted, log=log, stop=stop, on_update=on_update
            )
    finally:
        engine.dispose()


@contextmanager
def quickstart_service(
    settings: "Settings", *, has_gpu: bool, stop: StopSignal
) -> Iterator[Service]:
    """A service with a suitable number of workers, which write to `quickstart.log`."""
    from server.settings import count_cores  # noqa: PLC0415

    # On a CPU, one worker per option with a share of the cores is faster than one worker with all
    # cores. A GPU is used best by a single worker.
    num_workers = len(BuiltInOption) if not has_gpu and count_cores() >= 2 else 1
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with (
        (settings.data_dir / "quickstart.log").open("ab") as output,
        Service(
            settings, num_workers=num_workers, stop=stop, output=output, log_level="warning"
        ) as service,
    ):
        yield service


def run_quickstart(
    service: Service, *, client: "LosslabClient", num_samples: int | None, on_update: OnUpdate
) -> list[Json]:
    """Post options a, b and c and wait for them; a request to stop cancels the unfinished jobs.

    `num_samples` None is the full corpus.
    """
    size = {} if num_samples is None else {"num_samples": num_samples}
    jobs = [
        client.create_job(
            option,
            quick_test=True,
            name=f"quickstart {option}",
            priority=QUICKSTART_PRIORITY,
            **size,
        )
        for option in BuiltInOption
    ]
    job_ids = [job["id"] for job in jobs]
    jobs = _poll(service, client=client, job_ids=job_ids, on_update=on_update)
    if service.stop.is_set:
        jobs = _cancel(client, jobs)
    return jobs


def _poll(
    service: Service, *, client: "LosslabClient", job_ids: list[str], on_update: OnUpdate
) -> list[Json]:
    while True:
        service.check()
        jobs = [client.read_job(job_id) for job_id in job_ids]
        for job in jobs:
            on_update(job)
        if all(_is_settled(job) for job in jobs) or service.stop.wait(_POLL_SECONDS):
            return jobs


def _cancel(client: "LosslabClient", jobs: list[Json]) -> list[Json]:
    """Cancel the jobs that have not ended, so that the next start does not continue them."""
    deadline = time.monotonic() + _CANCEL_SECONDS
    for job in jobs:
        if not _is_settled(job):
            client.cancel_job(job["id"])
    while True:
        jobs = [client.read_job(job["id"]) for job in jobs]
        if all(_is_settled(job) for job in jobs) or time.monotonic() > deadline:
            return jobs
        time.sleep(_POLL_SECONDS)


def _is_settled(job: Json) -> bool:
    from server.client import SETTLED_STATUSES  # noqa: PLC0415

    return job["status"] in SETTLED_STATUSES


def _run_job(
    engine: "Engine",
    settings: "Settings",
    *,
    wanted: "JobRequest",
    log: Path | None,
    stop: StopSignal,
    on_update: OnUpdate,
) -> Json:
    from sqlmodel import Session  # noqa: PLC0415

    from server.database.engine import write_transaction  # noqa: PLC0415
    from server.jobs.submission import submit_job  # noqa: PLC0415

    with Session(engine) as session:
        job = wanted.make_job(session, datasets_dir=settings.datasets_dir)
    with write_transaction(engine) as session:
        submit_job(session, job, reserved_seconds=_RESERVED_SECONDS)
    arguments = ["--job", job.id, *(["--log", str(log)] if log else [])]
    with tempfile.TemporaryFile() as output:
        process = start_worker(settings, *arguments, output=output)
        _follow(engine, job.id, process=process, stop=stop, on_update=on_update)
        if not _is_settled(_read_job(engine, job.id)):
            _cancel_after_crash(engine, job.id, process=process, output=output)
    return {"job": _read_job(engine, job.id), "verdict": _judge(engine, job.id)}


def _follow(
    engine: "Engine", job_id: str, *, process: Process, stop: StopSignal, on_update: OnUpdate
) -> None:
    """Report the job until its worker ends; a request to stop cancels the job."""
    from server.jobs import queue  # noqa: PLC0415

    while process.poll() is None and not stop.wait(_POLL_SECONDS):
        on_update(_read_job(engine, job_id))
    if process.poll() is None:
        with suppress(ConflictError, NotFoundError):  # the job has just ended
            queue.cancel(engine, job_id)
        _wait_for_exit(process, stop=stop)
    on_update(_read_job(engine, job_id))


def _wait_for_exit(process: Process, *, stop: StopSignal) -> None:
    """The worker sees the cancel at its next step; if it does not, it is stopped."""
    deadline = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and not stop.is_urgent and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    stop_processes([process], stop=stop)


def _cancel_after_crash(
    engine: "Engine", job_id: str, *, process: Process, output: IO[bytes]
) -> None:
    """Cancel a job whose worker ended early, so that no other worker claims it later.

    Always raises StartError.
    """
    from server.jobs import queue  # noqa: PLC0415

    queue.cancel(engine, job_id)
    output.seek(max(0, output.seek(0, os.SEEK_END) - _OUTPUT_TAIL_BYTES))
    lines = output.read().decode(errors="replace").strip().splitlines() or ["no output"]
    raise StartError(
        f"the worker ended before job {job_id} (exit code {process.returncode}): {lines[-1]}"
    )


def _read_job(engine: "Engine", job_id: str) -> Json:
    from sqlmodel import Session  # noqa: PLC0415

    from server.api.schemas import JobPublic  # noqa: PLC0415
    from server.models.tables import Job  # noqa: PLC0415

    with Session(engine) as session:
        return JobPublic.of(session.get_one(Job, job_id)).model_dump(mode="json")


def _judge(engine: "Engine", job_id: str) -> Json:
    from sqlmodel import Session  # noqa: PLC0415

    from server.judging.histories import read_histories  # noqa: PLC0415
    from server.judging.verdicts import judge  # noqa: PLC0415
    from server.models.tables import Job  # noqa: PLC0415

    with Session(engine) as session:
        verdict = judge(session.get_one(Job, job_id), read_histories(session, [job_id])[job_id])
    return verdict.model_dump(mode="json")
