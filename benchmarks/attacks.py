"""The server while it is attacked: how long others wait, what a training loses, what memory grows.

Twenty attackers do one thing for a minute, then the next (`ATTACKS` lists them), while a job trains
in a worker beside the server. They come from four other loopback addresses, and some have a token
that may only read, as somebody who left a lab has. Three honest clients ask meanwhile: one for
`/healthz`, one with a token for `GET /jobs`, and one without for the login page. Afterwards all
three are asked again, to see whether anybody is still refused.

The attackers are threads of one process with the lowest priority on the same cores, and each pauses
after every request: what they compute themselves is no cost of the server, but cannot be taken out
of the training's loss either. The loss is against the quiet times before and after each attack.

Prints a row for each attack, writes `results/attacks.json`, and puts the table into the page about
security. It takes about half an hour on two cores that do nothing else:

    python -m benchmarks.attacks
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import update
from sqlmodel import Session, select

from benchmarks.attackers import ATTACKERS, ATTACKS, READ_TOKEN, Target
from benchmarks.load import find_percentile, find_speed, start, wait_for
from benchmarks.machine import REPOSITORY, describe_machine, show, write_results
from server.database.engine import open_database
from server.models.tables import Job, JobStatus
from server.settings import Settings
from server.tokens import ApiToken, TokenScope

PAGE = REPOSITORY / "docs" / "security.md"
TOKEN = "an-honest-user-has-this-token"
#: Epochs of some seconds each, more than the measurement needs also on a fast machine.
JOB = {"option": "b", "num_samples": 12_000, "epochs": 1000, "checkpoint_every": 100}
QUIET_SECONDS = 20.0
MAX_HEALTH_SECONDS = 1.0
MAX_SLOWDOWN = 0.15
MAX_GROWTH_MIB = 500
NUM_COMPARED, NUM_EPOCHS = 100, 200

sys.path.insert(0, str(REPOSITORY / "tests"))
import many_jobs  # noqa: E402 - the tests' own data

Row = dict[str, Any]
_processes = multiprocessing.get_context("spawn")


@dataclass
class Honest(threading.Thread):
    """A client that asks for one thing again and again."""

    url: str
    path: str
    token: str = ""
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._is_open = True

    # A thread is looked up by identity.
    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        while self._is_open:
            self.ask()
            time.sleep(0.1)

    def ask(self) -> str:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        begun = time.monotonic()
        # What this client computes counts as loss of the training, so it computes little.
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request("GET", self.path, headers=headers)
            answer = connection.getresponse()
            answer.read()
            status = str(answer.status)
        except (OSError, HTTPException) as error:
            status = type(error).__name__
        finally:
            connection.close()
        self.seconds.append(time.monotonic() - begun)
        self.statuses[status] += 1
        return status

    def close(self) -> None:
        self._is_open = False
        self.join(timeout=90)


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(("losslab",))
    with tempfile.TemporaryDirectory() as directory:
        rows = list(measure(Path(directory), arguments=arguments))
    if not arguments.no_write:
        seconds = {"attack_seconds": arguments.seconds, "num_attackers": ATTACKERS}
        write_results("attacks", machine | seconds | {"attacks": rows})
        show(format_table(rows), name="attacks", page=PAGE)
    if missed := [f"{row['attack']}: {each}" for row in rows for each in row["missed"]]:
        raise SystemExit("\n".join(["MISSES:", *missed]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each attack")
    parser.add_argument("--only", default="", help="names of attacks, separated by commas")
    parser.add_argument("--no-write", action="store_true", help="print the rows only")
    return parser.parse_args()


def measure(data_dir: Path, *, arguments: argparse.Namespace) -> Iterator[Row]:
    chosen = arguments.only.split(",") if arguments.only else list(ATTACKS)
    reader = ApiToken.of(READ_TOKEN, name="reader", scope=TokenScope.read)
    variables = {
        "LOSSLAB_API_TOKEN": TOKEN,
        "LOSSLAB_API_TOKENS": str(reader),
        "LOSSLAB_NUM_WORKERS": "2",
    }
    compared = tuple(store_jobs(data_dir))
    with (
        start(data_dir, "serve", "worker", **variables) as (url, processes),
        open_client(url) as client,
    ):
        job_id = client.post("/jobs", json=JOB).raise_for_status().json()["id"]
        wait_for(lambda: count_epochs(client, job_id) >= 3)
        target = Target(url=url, job_id=job_id, compared=compared)
        for name in chosen:
            row = attack(name, target=target, server=processes["serve"], seconds=arguments.seconds)
            row |= finish(row, client=client, job_id=job_id)
            print(format_row(row), flush=True)
            yield row


def open_client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {TOKEN}"})


def count_epochs(client: httpx.Client, job_id: str) -> int:
    number: int = client.get(f"/jobs/{job_id}").json()["epochs_completed"]
    return number


def attack(name: str, *, target: Target, server: int, seconds: float) -> Row:
    """Attack once, with quiet times before and after."""
    before = be_quiet(QUIET_SECONDS)
    with watching_memory(server) as memory:
        honest = [
            Honest(target.url, "/healthz"),
            Honest(target.url, "/jobs?limit=1", token=TOKEN),
            Honest(target.url, "/ui/login"),
        ]
        for each in honest:
            each.start()
        begun = datetime.now(UTC)
        seen = run_attackers(name, target=target, seconds=seconds)
        during = (begun, datetime.now(UTC))
        for each in honest:
            each.close()
    refused_afterwards = wait_until_answered(honest)
    after = be_quiet(QUIET_SECONDS)
    return {
        "attack": name,
        "does": (ATTACKS[name].__doc__ or "").splitlines()[0],
        "attackers_saw": seen,
        "spans": [before, during, after],
        "health_seconds_99th": find_percentile(honest[0].seconds, 0.99),
        "jobs_seconds_99th": find_percentile(honest[1].seconds, 0.99),
        "honest_statuses": dict(sum((each.statuses for each in honest), Counter())),
        "seconds_refused_afterwards": refused_afterwards,
        "memory_growth_mib": max(memory) - memory[0],
    }


def run_attackers(name: str, *, target: Target, seconds: float) -> dict[str, int]:
    """What the attackers were answered, by status or error."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_attack_together, args=(name, target, seconds, sender))
    process.start()
    seen: dict[str, int] = receiver.recv()
    process.join()
    return seen


def _attack_together(name: str, target: Target, seconds: float, sender: Any) -> None:
    os.nice(19)
    seen: Counter[str] = Counter()
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        while time.monotonic() < until:
            try:
                status = ATTACKS[name](target, number)
            except (OSError, HTTPException) as error:
                status = type(error).__name__
            seen[status] += 1
            time.sleep(0.05)

    threads = [
        threading.Thread(target=work, args=(number,), daemon=True) for number in range(ATTACKERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until + 60 - time.monotonic()))
    sender.send(dict(seen))


def be_quiet(seconds: float) -> tuple[datetime, datetime]:
    begun = datetime.now(UTC)
    time.sleep(seconds)
    return begun, datetime.now(UTC)


def wait_until_answered(honest: list[Honest]) -> float:
    """The seconds from the end of the attack until each honest client is answered again."""
    begun = time.monotonic()
    wait_for(lambda: all(each.ask() == "200" for each in honest))
    return time.monotonic() - begun


@contextmanager
def watching_memory(pid: int) -> Iterator[list[float]]:
    """The resident memory of the server and its children, in MiB, ten times per second."""
    values = [read_memory(pid)]
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.1):
            values.append(read_memory(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        is_done.set()
        thread.join()


def read_memory(pid: int) -> float:
    total = 0.0
    for each in (pid, *list_children(pid)):
        with suppress(OSError, ValueError):
            status = Path(f"/proc/{each}/status").read_text()
            total += int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return total


def list_children(pid: int) -> list[int]:
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += [int(child) for child in path.read_text().split()]
    return children


def finish(row: Row, *, client: httpx.Client, job_id: str) -> Row:
    """What the training lost, and which targets are missed."""
    epochs = client.get(f"/jobs/{job_id}/metrics").json()["data"]
    before, during, after = (find_speed(epochs, span=span) for span in row.pop("spans"))
    slowdown = 1 - during / ((before + after) / 2)
    missed = []
    if row["health_seconds_99th"] >= MAX_HEALTH_SECONDS:
        missed.append(f"/healthz took {row['health_seconds_99th']:.2f} s")
    if slowdown >= MAX_SLOWDOWN:
        missed.append(f"the training lost {slowdown:.0%}")
    if row["memory_growth_mib"] >= MAX_GROWTH_MIB:
        missed.append(f"memory grew by {row['memory_growth_mib']:.0f} MiB")
    return {"slowdown": slowdown, "missed": missed}


def format_row(row: Row) -> str:
    return (
        f"{row['attack']:20} /healthz {row['health_seconds_99th']:.2f} s, /jobs "
        f"{row['jobs_seconds_99th']:.2f} s, training {row['slowdown']:+.0%}, memory "
        f"+{row['memory_growth_mib']:.0f} MiB, honest {row['honest_statuses']}, refused for "
        f"{row['seconds_refused_afterwards']:.1f} s afterwards, attackers {row['attackers_saw']}"
        f"{'  MISSES' if row['missed'] else ''}"
    )


def format_table(rows: list[Row]) -> str:
    """A line for each attack."""
    lines = [
        "| attack, by 20 at a time for a minute | `/healthz`, 99th percentile | `/jobs`, 99th "
        "percentile | training loses | memory grows by | honest clients refused |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        statuses = row["honest_statuses"]
        refused = sum(number for status, number in statuses.items() if status != "200")
        cells = [
            row["does"].rstrip("."),
            f"{row['health_seconds_99th']:.2f} s",
            f"{row['jobs_seconds_99th']:.2f} s",
            f"{max(0, row['slowdown']):.0%}",
            f"{row['memory_growth_mib']:.0f} MiB",
            f"{refused} of {sum(statuses.values())}, {row['seconds_refused_afterwards']:.1f} s "
            "afterwards",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def store_jobs(data_dir: Path) -> list[str]:
    """Fill the database with finished jobs of many epochs; their ids."""
    engine = open_database(Settings(data_dir=data_dir))
    try:
        many_jobs.fill(engine, num_jobs=NUM_COMPARED, num_epochs=NUM_EPOCHS)
        with Session(engine) as session:
            session.execute(update(Job).values(status=JobStatus.succeeded))
            session.commit()
            return list(session.exec(select(Job.id)))
    finally:
        engine.dispose()


if __name__ == "__main__":
    main()
