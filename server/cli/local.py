"""Runs without a running service: one job without a server, and a study with one of its own.

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

from server.cli.listener import StartError
from server.cli.processes import (
    GRACE_SECONDS,
    Process,
    Service,
    StopSignal,
    check_worker_extra,
    has_gpu,
    start_worker,
    stop_processes,
)
from server.cli.reporting import check_target
from server.environment.cores import count_cores
from server.environment.modes import prepare_data_dir
from server.errors import ConflictError, InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from server.api.requests import JobRequest
    from server.client import LosslabClient
    from server.settings import Settings

Json = dict[str, Any]
OnUpdate = Callable[[Json], None]

LOCAL_PRIORITY: Final = 100  # before other queued jobs in the same data directory

#: No other worker on the same data directory can claim the job while its own worker starts.
_RESERVED_SECONDS = 60.0
_POLL_SECONDS = 0.25
_STUDY_POLL_SECONDS = 0.5
_CANCEL_SECONDS = 10.0
_OUTPUT_TAIL_BYTES = 2000
_CLIENT: Final = "losslab train"


def train(
    settings: "Settings",
    request: Json,
    *,
    log: Path | None,
    stop: StopSignal,
    on_update: OnUpdate,
) -> Json:
    """Run one job in its own worker; returns `job` and `verdict` in the API's form.

    A signal to stop cancels the job. Raises pydantic.ValidationError and InvalidInputError
    for invalid input, StartError if the worker died.
    """
    from server.api.requests import JobRequest  # noqa: PLC0415
    from server.database.engine import open_database  # noqa: PLC0415

    check_worker_extra()
    wanted = JobRequest.model_validate(request)
    if log is not None:
        check_target(log, what="log")
    if settings.wandb_project and find_spec("wandb") is None:
        raise InvalidInputError("wandb is not installed: pip install -e '.[wandb]', or --no-wandb")
    prepare_data_dir(
        settings.data_dir, parts=settings.file_dirs, with_group=settings.shared_with_group
    )
    engine = open_database(settings)
    try:
        with stop:
            return _run_job(
                engine, settings, wanted=wanted, log=log, stop=stop, on_update=on_update
            )
    finally:
        engine.dispose()


def choose_num_workers(num_jobs: int) -> int:
    """On a CPU, one worker per core is faster than one worker with all cores. A GPU is used best by
    a single worker."""
    return 1 if has_gpu() else max(1, min(count_cores(), num_jobs))


@contextmanager
def local_service(
    settings: "Settings", *, num_workers: int, stop: StopSignal, log_name: str
) -> Iterator[Service]:
    """A service on a free port, whose workers write to a log in the data directory."""
    prepare_data_dir(
        settings.data_dir,
        parts=[*settings.file_dirs, settings.data_dir / log_name],
        with_group=settings.shared_with_group,
    )
    with (
        (settings.data_dir / log_name).open("ab") as output,
        Service(
            settings, num_workers=num_workers, stop=stop, output=output, log_level="warning"
        ) as service,
    ):
        yield service


def follow_study(
    service: Service, client: "LosslabClient", study_id: str, on_update: OnUpdate
) -> Json:
    """Wait for a study of the service; returns it. A request to stop cancels it."""
    while True:
        service.check()
        study = client.read_study(study_id)
        on_update(study)
        if _is_settled(study):
            return study
        if service.stop.wait(_STUDY_POLL_SECONDS):
            return _cancel_study(client, study_id)


def _cancel_study(client: "LosslabClient", study_id: str) -> Json:
    """Cancel a study and see its jobs end, so that the next start does not continue them."""
    from server.client import RequestError  # noqa: PLC0415

    with suppress(RequestError):  # it has just ended
        client.cancel_study(study_id)
    deadline = time.monotonic() + _CANCEL_SECONDS
    while True:
        study = client.read_study(study_id)
        if _is_settled(study) or time.monotonic() > deadline:
            return study
        time.sleep(_POLL_SECONDS)


def _is_settled(answer: Json) -> bool:
    """Of a job or a study."""
    from server.client import SETTLED_STATUSES  # noqa: PLC0415

    return answer["status"] in SETTLED_STATUSES


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
    from server.jobs.admission import Admission  # noqa: PLC0415
    from server.jobs.submission import submit_job  # noqa: PLC0415

    with Session(engine) as session:
        job = wanted.make_job(session, datasets_dir=settings.datasets_dir)
    with write_transaction(engine) as session:
        admission = Admission(settings.datasets_dir, client=_CLIENT)
        submit_job(session, job, admission=admission, reserved_seconds=_RESERVED_SECONDS)
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
