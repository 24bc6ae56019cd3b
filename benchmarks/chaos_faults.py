"""The faults of `benchmarks.chaos`: each takes as long as it lasts."""

import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psycopg

if TYPE_CHECKING:
    import forks

    from benchmarks.chaos import Lab


def kill_worker(lab: "Lab", choice: random.Random) -> None:
    _kill(lab, choice.choice(lab.workers))


def kill_worker_that_writes(lab: "Lab", choice: random.Random) -> None:
    """Kill a worker as soon as there is a temporary file, which may be its own."""
    end = time.monotonic() + lab.lease_seconds
    while time.monotonic() < end:
        if _list_files(lab, ".*.safetensors"):
            kill_worker(lab, choice)
            return
        time.sleep(0.002)


def terminate_worker(lab: "Lab", choice: random.Random) -> None:
    worker = choice.choice(lab.workers)
    lab.stopped_at[worker.pid] = time.monotonic()
    worker.terminate()
    if choice.random() < 0.2:  # a second signal ends it at once
        lab.disturbed.add(worker.pid)
        time.sleep(0.05)
        worker.terminate()


def freeze_worker(lab: "Lab", choice: random.Random) -> None:
    worker = choice.choice(lab.workers)
    lab.disturbed.add(worker.pid)
    with lab.outage():  # it may hold a lock
        worker.send_signal(signal.SIGSTOP)
        time.sleep(choice.uniform(0.2, 2.5) * lab.lease_seconds)
        worker.send_signal(signal.SIGCONT)


def kill_server(lab: "Lab", choice: random.Random) -> None:
    if lab.server is not None:
        with lab.outage():
            lab.server.kill()
            time.sleep(choice.uniform(0.0, 1.0))


def freeze_server(lab: "Lab", choice: random.Random) -> None:
    server = lab.server
    if server is not None:
        with lab.outage():
            server.send_signal(signal.SIGSTOP)
            time.sleep(choice.uniform(0.2, 2.0) * lab.lease_seconds)
            server.send_signal(signal.SIGCONT)


def lock_database(lab: "Lab", choice: random.Random) -> None:
    seconds = choice.uniform(0.2, 2.0) * lab.lease_seconds
    with lab.outage(), suppress(sqlite3.OperationalError, psycopg.OperationalError):
        if lab.settings.database_url:
            with psycopg.connect(lab.settings.database_url) as connection:
                connection.execute("LOCK TABLE job IN EXCLUSIVE MODE")
                time.sleep(seconds)
            return
        path = lab.settings.data_dir / "losslab.db"
        with closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as lite:
            lite.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)


_restarting = threading.Lock()


def stop_database(lab: "Lab", choice: random.Random) -> None:
    """An immediate stop of PostgreSQL, as in a crash; of SQLite there is nothing to stop."""
    if lab.postgres is None:
        lock_database(lab, choice)
        return
    with _restarting, lab.outage():
        lab.postgres.stop(signal.SIGQUIT)
        time.sleep(choice.uniform(0.0, 2.5) * lab.lease_seconds)
        lab.postgres.start()


def fill_disk(lab: "Lab", choice: random.Random) -> None:
    path = lab.settings.runs_dir / f"ballast-{choice.random()}"
    with lab.outage():
        try:
            with suppress(OSError), path.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
            time.sleep(choice.uniform(0.2, 1.5) * lab.lease_seconds)
        finally:
            path.unlink()


def touch_temporary_file(lab: "Lab", choice: random.Random) -> None:
    """Cut or remove a file that is being written."""
    end = time.monotonic() + lab.lease_seconds / 2
    while time.monotonic() < end:
        # Not a second name that a kept file has for a moment.
        if files := [file for file in _list_files(lab, ".*.safetensors") if _is_alone(file)]:
            _cut_or_remove(choice.choice(files), choice)
            return
        time.sleep(0.002)


def touch_checkpoint(lab: "Lab", choice: random.Random) -> None:
    """Cut or remove a file that a row names."""
    files = [*_list_files(lab, "checkpoint_*"), *_list_files(lab, "reconstructions_epoch_*")]
    if files:
        path = choice.choice(files)
        lab.touched.add((path.parent.parent.name, path.name))
        _cut_or_remove(path, choice)


FAULTS: Final[dict[str, Callable[["Lab", random.Random], None]]] = {
    "killed worker": kill_worker,
    "worker killed in mid-write": kill_worker_that_writes,
    "stopped worker": terminate_worker,
    "frozen worker": freeze_worker,
    "killed server": kill_server,
    "frozen server": freeze_server,
    "locked database": lock_database,
    "stopped database": stop_database,
    "full disk": fill_disk,
    "touched temporary file": touch_temporary_file,
    "touched checkpoint": touch_checkpoint,
}


def _kill(lab: "Lab", worker: "forks.Fork") -> None:
    lab.disturbed.add(worker.pid)
    worker.kill()


def _list_files(lab: "Lab", pattern: str) -> list[Path]:
    return list(lab.settings.runs_dir.glob(f"*/checkpoints/{pattern}"))


def _is_alone(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_nlink == 1
    return False


def _cut_or_remove(path: Path, choice: random.Random) -> None:
    with suppress(FileNotFoundError):
        if choice.random() < 0.5:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
