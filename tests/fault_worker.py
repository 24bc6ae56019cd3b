"""Real worker processes for the tests, with faults.

The program `fault_worker POINT ...` is `python -m worker ...` with one fault in it: it is killed,
slowed down, frozen or given a real error where POINT says.
"""

import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import forks
import psycopg
import torch

import worker.main
from server.files.artifacts import JobFiles, WrittenFile
from server.jobs import queue
from server.models.configuration import TrainingConfig
from server.settings import Settings
from worker import recorder
from worker.checkpoints import save_checkpoint
from worker.step import TrainingStep
from worker.training import TrainingState

#: A job of 15 steps per epoch that saves resume points inside its epochs.
SHORT_JOB = {"num_samples": 150, "epochs": 3, "batch_size": 8}
MIDDLE_OF_EPOCH_1, MIDDLE_OF_EPOCH_2 = 8, 22
#: Short leases and short retry delays. One thread per worker on every machine, since
#: the numbers of a training depend on how many there are.
QUICK: dict[str, Any] = {
    "lease_seconds": 1.5,
    "heartbeat_seconds": 0.3,
    "checkpoint_seconds": 0.25,
    "retry_seconds": 0.1,
    "poll_seconds": 0.05,
    "idle_transaction_seconds": 2.0,
    "num_workers": 1000,
}
_PACE_SECONDS = 0.07
_LONGEST_WAIT_SECONDS = 180.0

T = TypeVar("T")

_lost: set[str] = set()


def wait_for(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
    return value


class WorkerProcess:
    """`python -m worker` with these settings; it does not outlive its `with` block."""

    def __init__(self, settings: Settings, *arguments: str, point: str | None = None) -> None:
        self._settings = settings
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._log_path = settings.data_dir / f"worker-{time.monotonic_ns()}.log"
        program = ["worker"] if point is None else ["fault_worker", point]
        with self._log_path.open("wb") as log:
            self._process = forks.start(
                *program,
                *arguments,
                environment=_make_environment(settings),
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit code, minus the signal's number if one killed it."""
        return self._process.wait(timeout=_LONGEST_WAIT_SECONDS)

    def terminate(self) -> None:
        self._process.terminate()

    def freeze(self) -> None:
        """Stop it while it holds no lock: holding SQLite's, it would stop all processes."""
        wait_for(self._try_to_freeze)

    def wait_until_frozen(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _try_to_freeze(self) -> bool:
        self._process.send_signal(signal.SIGSTOP)
        self.wait_until_frozen()
        if _is_unlocked(self._settings):
            return True
        self.thaw()
        return False


def run_worker(settings: Settings, *arguments: str, point: str | None = None) -> int:
    """Let a worker run to its end and return its exit code."""
    with WorkerProcess(settings, *arguments, point=point) as process:
        return process.wait()


def _make_environment(settings: Settings) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LOSSLAB_")}
    names = {"data_dir", "database_url", "jobs_per_worker", *QUICK}
    given = settings.model_dump(include=names, exclude_none=True)
    ours = {f"LOSSLAB_{key.upper()}": str(value) for key, value in given.items()}
    return clean | ours | {"OMP_NUM_THREADS": "1"}


def _is_unlocked(settings: Settings) -> bool:
    """Whether no process is inside a transaction that locks the jobs for others."""
    try:
        if settings.database_url.startswith("postgresql"):
            with psycopg.connect(settings.database_url) as connection:
                connection.execute("LOCK TABLE job, worker IN ACCESS EXCLUSIVE MODE NOWAIT")
        else:
            path = settings.resolved_database_url.removeprefix("sqlite:///")
            with closing(sqlite3.connect(path, timeout=0)) as lite:
                lite.execute("BEGIN IMMEDIATE")
    except (psycopg.errors.LockNotAvailable, sqlite3.OperationalError):
        return False
    return True


def _die(*_args: Any, **_kwargs: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives SIGKILL")


def _freeze(*_args: Any, **_kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _freeze_unlocked(*_args: Any, **_kwargs: Any) -> None:
    """Freeze while the heartbeat's thread holds no lock either, see `WorkerProcess.freeze`."""
    settings = Settings()
    wait_for(lambda: _is_unlocked(settings))
    _freeze()


def _write_half(path: Path, state: TrainingState, *, config: TrainingConfig) -> NoReturn:
    save_checkpoint(path, state, config=config)
    os.truncate(path, path.stat().st_size // 2)
    _die()


def _oversleep(*_args: Any, **_kwargs: Any) -> None:
    logging.getLogger("worker").info("this step takes three leases")
    time.sleep(3 * Settings().lease_seconds)


def _break_device(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _let_save(*_args: Any, **_kwargs: Any) -> None:
    """After this step a resume point is due, however fast the machine is."""
    time.sleep(1.2 * QUICK["checkpoint_seconds"])


def _run_out_of_memory(*_args: Any, **_kwargs: Any) -> None:
    torch.empty(2**55)


def _pace(*_args: Any, **_kwargs: Any) -> None:
    time.sleep(_PACE_SECONDS)


def _lose_file(file: WrittenFile) -> None:
    """Remove or cut each file once, before it gets its name."""
    if file.file_name in _lost:
        return
    _lost.add(file.file_name)
    if len(_lost) % 2:
        file.temporary_path.unlink()
    else:
        os.truncate(file.temporary_path, 10)


def _die_after_checkpoint(file: WrittenFile) -> None:
    if file.file_name == "checkpoint_epoch_2.safetensors":
        _die()


def _patch(
    owner: Any,
    name: str,
    act: Callable[..., None],
    *,
    call: int | None = None,
    is_after: bool = False,
) -> None:
    """Call `act` before or after a function's `call`-th call, or every call."""
    original, num_calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        is_due = call in (None, num_calls)
        if is_due and not is_after:
            act(*args, **kwargs)
        result = original(*args, **kwargs)
        if is_due and is_after:
            act(*args, **kwargs)
        return result

    setattr(owner, name, patched)


def _install(point: str) -> None:
    match point:
        case "claimed":
            _patch(worker.main, "run_job", _die)
        case "mid_batch":
            _patch(TrainingStep, "run", _die, call=MIDDLE_OF_EPOCH_2)
        case "mid_checkpoint_write":
            _patch(TrainingStep, "run", _let_save, call=MIDDLE_OF_EPOCH_1)
            _patch(recorder, "save_checkpoint", _write_half, call=2)
        case "file_without_row":
            _patch(TrainingStep, "run", _let_save, call=MIDDLE_OF_EPOCH_1)
            _patch(WrittenFile, "publish", _die, call=2, is_after=True)
        case "checkpoint_without_row":
            _patch(WrittenFile, "publish", _die_after_checkpoint, is_after=True)
        case "row_without_status":
            _patch(queue, "finish", _die)
        case "device_failure":
            _patch(TrainingStep, "run", _break_device, call=MIDDLE_OF_EPOCH_2)
        case "out_of_memory":
            _patch(TrainingStep, "run", _run_out_of_memory, call=MIDDLE_OF_EPOCH_2)
        case "slow_step":
            _patch(TrainingStep, "run", _oversleep, call=MIDDLE_OF_EPOCH_2)
        case "paced":  # there is time to interrupt it, at no cost
            _patch(TrainingStep, "run", _pace)
        case "frozen_first_sweep":
            _patch(JobFiles, "sweep", _freeze_unlocked, call=1)
        case "frozen_later_sweep":
            _patch(JobFiles, "sweep", _freeze_unlocked, call=3)
        case "lost_files":
            _patch(WrittenFile, "publish", _lose_file)
        case "frozen_transaction":
            _patch(WrittenFile, "publish", _freeze, call=2)
        case _:
            raise ValueError(f"there is no point {point!r}")


def main() -> None:
    _install(sys.argv.pop(1))
    worker.main.main()
