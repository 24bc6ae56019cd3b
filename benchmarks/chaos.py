"""Break everything at random for some minutes, and see what stays true.

Workers and the server are killed, stopped and frozen, the database is locked and taken away, the
disk is filled, and files are cut and removed, while a client posts, pauses and cancels jobs. Then
each invariant is one line, and the exit status is 1 if one is broken. The choice of faults follows
the seed; their moments follow the machine.

Needs the developers' packages. Disks are filled only where root may mount one.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.chaos_client import MAX_JOBS_PER_MINUTE, Client
from benchmarks.chaos_faults import FAULTS
from benchmarks.chaos_invariants import Evidence, list_invariants
from benchmarks.machine import REPOSITORY, describe_machine, write_results
from server.database.engine import open_database
from server.settings import Settings

sys.path.insert(0, str(REPOSITORY / "tests"))

import forks
from postgres import Postgres

_LONGEST_END_SECONDS: Final = 240.0
#: How long a worker that was asked to stop may take.
_STOP_SECONDS: Final = 30.0
#: Between two faults. If they were denser, no job would end among them.
_PAUSE_LEASES: Final = (0.1, 0.6)
#: Checkpoints and pictures of the largest job.
_MEGABYTES_PER_JOB: Final = 40
#: What workers want free beside them, and the first jobs.
_MIN_DISK_MEGABYTES: Final = 700


def main() -> None:
    arguments = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="losslab-chaos-"))
    with ExitStack() as stack:
        if not arguments.keep:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lab = stack.enter_context(open_lab(folder, arguments=arguments))
        machine = describe_machine(("losslab", "torch", "sqlalchemy"))
        evidence = run(lab, arguments=arguments)
        found = report(evidence, lab=lab)
        is_broken = any(entry["problems"] for entry in found.values())
        if arguments.results:
            asked = {"database": arguments.database, "minutes": arguments.minutes}
            asked |= {"seed": arguments.seed, "lease_seconds": arguments.lease_seconds}
            results = {"faults": dict(evidence.faults), "invariants": found}
            write_results(arguments.results, machine | asked | results)
        if is_broken and arguments.keep:
            print(f"everything is kept in {folder}")
    sys.exit(is_broken)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of faults")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--lease-seconds", type=float, default=4.0, help="longer on busy machines")
    parser.add_argument("--results", help="name of a file in results/, which is written")
    parser.add_argument("--keep", action="store_true", help="keep data and logs")
    return parser.parse_args()


@dataclass
class Lab:
    """A server and workers on one data directory, and what was done to them."""

    folder: Path
    settings: Settings
    postgres: Postgres | None
    has_disk: bool
    num_workers: int
    lease_seconds: float
    port: int = field(default_factory=lambda: find_free_port())
    server: forks.Fork | None = None
    workers: list[forks.Fork] = field(default_factory=list)
    #: Processes that were killed or frozen: only these may lose a job.
    disturbed: set[int] = field(default_factory=set)
    #: When workers were asked to stop.
    stopped_at: dict[int, float] = field(default_factory=dict)
    #: Files that were cut or removed, by job and name: only these may differ from their rows.
    touched: set[tuple[str, str]] = field(default_factory=set)
    #: When the database was away or locked, or the disk was full.
    outages: list[tuple[float, float]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_server(self) -> None:
        self.server = self._start("losslab", "serve", "--port", str(self.port))

    def start_missing(self) -> None:
        """Start the server and workers that have ended."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < self.num_workers:
            self.workers.append(self._start("worker"))
        if self.server is None or self.server.poll() is not None:
            self.start_server()

    def stop(self) -> None:
        processes = [*self.workers, *filter(None, [self.server])]
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()

    @contextmanager
    def outage(self) -> Iterator[None]:
        begun_at = time.monotonic()
        try:
            yield
        finally:
            self.outages.append((begun_at, time.monotonic()))

    def may_have_lost(self, pid: int) -> bool:
        """Whether this worker was killed or frozen, or had to stop in an outage, in which it cannot
        hand its job back."""
        stopped_at = self.stopped_at.get(pid)
        return pid in self.disturbed or (
            stopped_at is not None
            and any(
                begin < stopped_at + _STOP_SECONDS and end > stopped_at
                for begin, end in self.outages
            )
        )

    def _start(self, program: str, *arguments: str) -> forks.Fork:
        values = {
            "DATA_DIR": self.settings.data_dir,
            "DATABASE_URL": self.settings.database_url,
            "LEASE_SECONDS": self.lease_seconds,
            "HEARTBEAT_SECONDS": self.lease_seconds / 5,
            "IDLE_TRANSACTION_SECONDS": self.lease_seconds / 2,
            "CHECKPOINT_SECONDS": 0.5,
            "RETRY_SECONDS": 0.5,
            "MAX_ATTEMPTS": 100,
            "NUM_WORKERS": 1000,  # one thread: numbers depend on how many there are
        }
        ours = {f"LOSSLAB_{name}": str(value) for name, value in values.items()}
        with (self.folder / f"{program}.log").open("ab") as log:
            return forks.start(
                program, *arguments, environment=os.environ | ours, stdout=log, stderr=log
            )


@contextmanager
def open_lab(folder: Path, *, arguments: argparse.Namespace) -> Iterator[Lab]:
    with ExitStack() as stack:
        server, url = None, ""
        if arguments.database == "postgresql":
            server = stack.enter_context(Postgres())
            url = server.create_database()
            with psycopg.connect(url, autocommit=True) as connection:
                name = connection.info.dbname
                connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = on".encode())
        settings = Settings(data_dir=folder / "data", database_url=url)
        num_jobs = round(MAX_JOBS_PER_MINUTE * arguments.minutes)
        megabytes = _MIN_DISK_MEGABYTES + _MEGABYTES_PER_JOB * num_jobs
        has_disk = stack.enter_context(mounted(settings.runs_dir, megabytes=megabytes))
        lab = Lab(folder, settings, server, has_disk, arguments.workers, arguments.lease_seconds)
        try:
            yield lab
        finally:
            lab.stop()


@contextmanager
def mounted(path: Path, *, megabytes: int) -> Iterator[bool]:
    """A disk at the path; says whether there is one."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    is_mounted = shutil.which("mount") is not None and os.geteuid() == 0
    is_mounted = is_mounted and not subprocess.run(command, capture_output=True).returncode
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def run(lab: Lab, *, arguments: argparse.Namespace) -> Evidence:
    """First the jobs without a fault, then with faults, then without again until all ended."""
    choice, faults = random.Random(arguments.seed), Counter[str]()
    lab.start_missing()
    client = Client(lab.url, seed=arguments.seed)
    references = client.run_references()
    client.start()
    names = [name for name in FAULTS if name != "full disk" or lab.has_disk]
    end = time.monotonic() + 60 * arguments.minutes
    pool: list[threading.Thread] = []
    while time.monotonic() < end:
        name = choice.choice(names)
        faults[name] += 1
        seed = choice.random()
        thread = threading.Thread(target=FAULTS[name], args=(lab, random.Random(seed)))
        thread.start()
        pool.append(thread)
        time.sleep(choice.uniform(*_PAUSE_LEASES) * lab.lease_seconds)
        lab.start_missing()
    for thread in pool:
        thread.join()
    client.stop_posting()
    deadline = time.monotonic() + _LONGEST_END_SECONDS
    while not client.has_ended and time.monotonic() < deadline:
        lab.start_missing()
        time.sleep(0.5)
    client.close()
    lab.stop()
    engine = open_database(lab.settings)
    return Evidence(engine, lab, client, references, faults)


def report(evidence: Evidence, *, lab: Lab) -> dict[str, dict[str, Any]]:
    """Print a line per invariant; returns what was found, by invariant."""
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(evidence.faults.items()))
    print(f"{evidence.faults.total()} faults ({faults})")
    if not lab.has_disk:
        print("full disks were not tried: only root may mount one")
    found = {}
    for name, check in list_invariants():
        problems, extent = check(evidence)
        found[name] = {"extent": extent, "problems": problems}
        print(f"{'BROKEN' if problems else 'holds '} {name} ({extent})")
        for problem in problems[:5]:
            print(f"         {problem}")
    return found


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
