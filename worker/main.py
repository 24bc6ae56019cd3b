"""The worker process: claims jobs and runs them until it is told to stop."""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from importlib.metadata import version
from pathlib import Path

import torch
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

from server.database.engine import is_outage, open_database
from server.database.notifications import JobListener
from server.database.schema import SchemaError, check_schema
from server.environment.modes import keep_private, prepare_data_dir
from server.environment.source import read_source
from server.environment.variables import read_foreign_secrets
from server.errors import LosslabError, StorageFullError
from server.jobs import queue, workers
from server.jobs.admission import count_queued
from server.jobs.reaper import Reaper
from server.logs import configure_logging
from server.messages import describe_error, hide_secrets, redact_tracebacks
from server.models.tables import Worker, WorkerState
from server.settings import Settings, WorkerSettings
from worker.attempt import outlast_outages
from worker.capture import keep_compiled
from worker.device import (
    choose_device,
    describe_device,
    keep_freed_memory,
    take_share_of_cores,
)
from worker.failures import DeviceBrokenError
from worker.room import Room
from worker.runner import run_job
from worker.slots import Slots, choose_num_slots
from worker.step import warm_up

_PARENT_CHECK_SECONDS = 1.0

_logger = logging.getLogger(__name__)


def main() -> None:
    arguments = _parse_arguments()
    redact_tracebacks()
    try:
        settings = WorkerSettings()
        hide_secrets([*settings.secrets, *read_foreign_secrets()])
        keep_private(with_group=settings.shared_with_group)
        configure_logging(as_json=settings.json_logs, log_path=arguments.log)
        prepare_data_dir(
            settings.data_dir, parts=settings.file_dirs, with_group=settings.shared_with_group
        )
    except (LosslabError, OSError, ValueError) as error:
        sys.exit(describe_error(error))
    shutdown = _Shutdown()
    _install_signals(shutdown)
    if arguments.with_parent:
        _watch_parent(shutdown)
    keep_freed_memory()
    read_source()  # before anybody changes what was just imported
    num_slots = 1 if arguments.job is not None else choose_num_slots(settings)
    take_share_of_cores(num_workers=settings.num_workers * num_slots)
    try:
        engine = outlast_outages(shutdown, give_up_seconds=0)(open_database, settings)
    except (LosslabError, OSError) as error:
        sys.exit(describe_error(error))
    except SQLAlchemyError as error:
        _raise_unless_stopped(error, shutdown=shutdown)
        return
    _warm_up(settings)
    try:
        slots = Slots(num_slots, shutdown=shutdown)
        slots.run(
            lambda: work(
                settings,
                engine=engine,
                shutdown=shutdown,
                is_drain=arguments.drain or arguments.job is not None,
                job_id=arguments.job,
                slots=slots,
            )
        )
    except DeviceBrokenError as error:
        _logger.critical("%s; this worker ends, and another must be started", error)
        sys.exit(1)
    except (StorageFullError, SchemaError) as error:
        sys.exit(str(error))
    except SQLAlchemyError as error:
        _raise_unless_stopped(error, shutdown=shutdown)
    finally:
        engine.dispose()
    if arguments.drain and shutdown.number:
        sys.exit(128 + shutdown.number)  # jobs may wait


def work(
    settings: Settings,
    *,
    engine: Engine,
    shutdown: threading.Event,
    is_drain: bool = False,
    job_id: str | None = None,
    slots: Slots | None = None,
) -> None:
    """Claim and run jobs, one at a time, until `shutdown`; with `is_drain`, until no job waits.

    With `job_id` only that job is run. Raises DeviceBrokenError, and with `is_drain`
    StorageFullError if jobs wait that cannot be run.
    """
    worker = outlast_outages(shutdown, give_up_seconds=0)(_register, engine)
    loop = _ClaimLoop(
        settings,
        engine=engine,
        shutdown=shutdown,
        worker=worker,
        job_id=job_id,
        slots=slots or Slots(1, shutdown=shutdown),
    )
    try:
        while not shutdown.is_set() and not loop.is_given_up:
            try:
                if loop.run_next():
                    continue
                if is_drain and not loop.may_find_work():
                    break
                if is_drain and (obstacle := loop.find_obstacle()):
                    raise StorageFullError(f"jobs wait, and none is claimed {obstacle}")
                loop.wait()
            except SQLAlchemyError as error:
                if not is_outage(error):
                    raise
                _logger.warning("the database does not answer; trying again: %s", error)
                shutdown.wait(settings.heartbeat_seconds)
    finally:
        loop.close()
        _report_stopped(engine, worker.id)


def _warm_up(settings: Settings) -> None:
    """On a GPU, do before the first claim what the first job would wait for."""
    device = choose_device()
    if device.type != "cuda":
        return
    keep_compiled(settings.cache_dir / "compiled")
    try:
        warm_up(device)
    except RuntimeError as error:
        # A job will say the same, or find more memory.
        _logger.warning("the GPU was not made ready: %s", error)


class _Shutdown(threading.Event):
    """A request to end, and the number of the signal that made it."""

    number = 0


class _ClaimLoop:
    """One round of a worker: a heartbeat, a claim, then a job or a wait for one."""

    def __init__(
        self,
        settings: Settings,
        *,
        engine: Engine,
        shutdown: threading.Event,
        worker: Worker,
        job_id: str | None,
        slots: Slots,
    ) -> None:
        self.is_given_up = False  # for want of memory
        self._slots = slots
        self._settings = settings
        self._engine = engine
        self._shutdown = shutdown
        self._worker = worker
        self._job_id = job_id
        self._listener = JobListener(engine)
        self._reaper = Reaper(engine, settings=settings)
        self._room = Room(settings.runs_dir)
        self._beat_at = 0.0

    def run_next(self) -> bool:
        """Run the next job; returns whether there was one.

        Raises DeviceBrokenError and SchemaError."""
        # A worker that is older than the server's schema must not touch any job.
        check_schema(self._engine)
        self._beat_if_due()
        if self.find_obstacle() or self._slots.find_obstacle():
            return False
        job = queue.claim(
            self._engine,
            worker_id=self._worker.id,
            lease_seconds=self._settings.lease_seconds,
            job_id=self._job_id,
        )
        if job is None:
            return False
        failure = run_job(
            job,
            settings=self._settings,
            engine=self._engine,
            shutdown=self._shutdown,
            reaper=self._reaper,
            give_up_slot=self._give_up,
        )
        if failure is not None and failure.is_of_disk:
            self._room.doubt()
        self._beat_at = 0.0
        return True

    def find_obstacle(self) -> str | None:
        """Until when no job is claimed. Who names one job waits to hear of its failure instead."""
        if self._job_id is not None:
            return None
        return self._room.find_obstacle()

    def _give_up(self) -> bool:
        self.is_given_up = self._slots.give_up_one()
        return self.is_given_up

    def may_find_work(self) -> bool:
        """Whether a job waits, or may be requeued soon since its worker seems to be dead."""
        with Session(self._engine) as session:
            if count_queued(session, job_id=self._job_id):
                return True
        return self._job_id is None and self._reaper.is_in_doubt()

    def wait(self) -> None:
        """Wait for a job, for at most `poll_seconds`."""
        self._listener.wait(self._shutdown, poll_seconds=self._settings.poll_seconds)

    def close(self) -> None:
        self._listener.close()

    def _beat_if_due(self) -> None:
        """Send an idle worker's heartbeat, and requeue the jobs of dead workers."""
        if time.monotonic() >= self._beat_at:
            workers.report_idle(self._engine, self._worker)
            self._reaper.reap()
            self._beat_at = time.monotonic() + self._settings.heartbeat_seconds


def _raise_unless_stopped(error: SQLAlchemyError, *, shutdown: threading.Event) -> None:
    """A worker that is stopped while it waits for the database ends as any other."""
    if not (shutdown.is_set() and is_outage(error)):
        raise error
    _logger.warning("this worker was stopped while it waited for the database")


def _report_stopped(engine: Engine, worker_id: str) -> None:
    try:
        workers.report_stopped(engine, worker_id)
    except SQLAlchemyError as error:
        _logger.warning("the database was not told that worker %s ends: %s", worker_id, error)


def _register(engine: Engine) -> Worker:
    host, pid = socket.gethostname(), os.getpid()
    worker = Worker(
        # A host may use a pid again, so host and pid alone do not identify a worker.
        id=f"{host}/{pid}/{uuid.uuid4().hex[:6]}",
        host=host,
        pid=pid,
        device=describe_device(choose_device()),
        version=version("losslab"),
        torch_version=torch.__version__,
        state=WorkerState.idle,
    )
    workers.register(engine, worker)
    _logger.info("worker %s waits for jobs on %s", worker.id, worker.device)
    return worker


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m worker",
        description="Claim and train jobs; LOSSLAB_* variables say where they are.",
    )
    parser.add_argument("--drain", action="store_true", help="end when no job waits")
    parser.add_argument("--job", metavar="ID", help="run this one job and end")
    parser.add_argument("--log", metavar="PATH", type=Path, help="write the log here as well")
    parser.add_argument(
        "--with-parent", action="store_true", help="stop when the process that started it ends"
    )
    return parser.parse_args()


def _install_signals(shutdown: _Shutdown) -> None:
    def on_signal(number: int, _frame: object) -> None:
        if shutdown.is_set():
            # A second signal means at once. What was committed stays, and the lease runs out.
            os._exit(128 + number)
        shutdown.number = number
        shutdown.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def _watch_parent(shutdown: threading.Event) -> None:
    """Set `shutdown` when the parent has ended: then another process is this one's parent."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        shutdown.set()

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
