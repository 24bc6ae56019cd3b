"""The command `losslab` as tests run it, and a `losslab up` for them to ask."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import forks
from forks import Fork

TINY = ["--num-samples", "300", "--epochs", "1"]

Finished = subprocess.CompletedProcess[str]
T = TypeVar("T")


def make_environment(**changes: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LOSSLAB_")}
    # One thread: two would wait for each other on busy cores.
    quick = {"POLL_SECONDS": "0.05", "RETRY_SECONDS": "0.1", "NUM_WORKERS": "2"}
    ours = {f"LOSSLAB_{name}": value for name, value in quick.items()}
    return clean | {"COLUMNS": "200"} | ours | changes


def run(*arguments: str, **environment: str) -> Finished:
    return forks.run("losslab", *arguments, environment=make_environment(**environment))


@dataclass(frozen=True)
class Up:
    """A running `losslab up`."""

    process: Fork
    data_dir: Path
    log_path: Path

    @property
    def output(self) -> str:
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        return wait_for(lambda: re.search(r"http://127.0.0.1:\d+", self.output))[0]

    def run(self, *arguments: str) -> Finished:
        return run(*arguments, LOSSLAB_URL=self.url)


@contextmanager
def running_up(data_dir: Path) -> Iterator[Up]:
    """`losslab up` until the end of the block, which must leave neither an error nor a process."""
    log_path = data_dir / "up.log"
    environment = make_environment(LOSSLAB_DATA_DIR=str(data_dir))
    with log_path.open("w") as log:
        process = forks.start(
            "losslab",
            "up",
            "--port",
            "0",
            "--workers",
            "1",
            environment=environment,
            stdout=log,
            stderr=log,
        )
    try:
        yield Up(process, data_dir, log_path)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=40)
    up = Up(process, data_dir, log_path)
    # The test itself may have killed it.
    assert process.returncode in (0, -signal.SIGKILL), up.output
    assert "Traceback" not in up.output
    assert find_processes(data_dir) == []


def find_processes(data_dir: Path) -> list[int]:
    """The processes with this data directory."""
    needle = f"LOSSLAB_DATA_DIR={data_dir}\0".encode()
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ")
            if needle in read_bytes(path)]  # fmt: skip


def find_workers(up: Up) -> list[int]:
    return [pid for pid in find_processes(up.data_dir) if pid != up.process.pid]


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # another user's, or gone
        return b""


def wait_for(condition: Callable[[], T], *, seconds: float = 40) -> T:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
    return value


def assert_one_line(done: Finished, *, code: int, words: str) -> None:
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
