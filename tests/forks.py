"""Real processes that start at once, as forks of one that has imported everything.

Importing PyTorch and the rest takes seconds of a core, and the tests start some two hundred
processes. Run as a script, this is the process from which the others are forked. A fork runs
`main` of a program with arguments, environment and files of its own. It is a child of the
process of the tests, takes signals and ends as any other.
"""

import atexit
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).parent.parent
#: Programs by name: a module, and what is called in it.
PROGRAMS = {
    "losslab": ("server.cli.main", "app"),
    "weak": ("weak", "main"),
    "worker": ("worker.main", "main"),
    "fault_worker": ("fault_worker", "main"),
    "claimant": ("claimant", "main"),
}
#: What a program imports only once it is needed.
LATE_MODULES = {
    "losslab": ("server.main", "server.client", "uvicorn", "alembic.command", "scipy.stats"),
    "weak": ("server.cli.main", "server.main", "server.client", "uvicorn"),
    "worker": ("matplotlib.pyplot",),
    "fault_worker": ("matplotlib.pyplot",),
    "claimant": (),
}
#: From Linux's <sys/prctl.h>: orphans become children of this process.
_PR_SET_CHILD_SUBREAPER = 36
_MAX_REQUEST_BYTES = 128 * 1024

File = IO[Any] | int

_asking = threading.Lock()


class Fork:
    """A process, used like a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception is not None:
            self.kill()
        self.wait()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one killed it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                ended, _, _ = select.select([descriptor], [], [], timeout)
            finally:
                os.close(descriptor)
            if not ended:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            # Under a debugger it can be collected a moment later.
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    program: str,
    *arguments: str,
    environment: Mapping[str, str],
    stdin: File | None = None,
    stdout: File,
    stderr: File,
) -> Fork:
    request = {"program": program, "arguments": arguments, "environment": dict(environment)}
    with open(os.devnull) as nothing:
        files = [nothing if stdin is None else stdin, stdout, stderr]
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        with _asking:  # else two threads could get each other's process
            connection = _connect()
            socket.send_fds(connection, [json.dumps(request).encode()], numbers)
            return Fork(int(connection.recv(32)))


def run(
    program: str, *arguments: str, environment: Mapping[str, str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Let it run to its end, and return what it said."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(program, *arguments, environment=environment, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(
            [program, *arguments], code, stdout=stdout.read(), stderr=stderr.read()
        )


@cache
def _connect() -> socket.socket:
    """Start the process from which the others are forked."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # With threads it could be forked while one of them holds a lock.
    changes = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=os.environ | changes,
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )

    def stop() -> None:
        ours.close()
        process.wait(timeout=60)

    atexit.register(stop)
    return ours


class _Main:
    """What a fork runs. It leaves once all has been done that is done at an exit, and does not
    take apart what was imported, which would take longer than most programs run."""

    def __init__(self) -> None:
        self._code = 1
        atexit.register(self._leave)  # the first is called last
        self._call: Callable[[], object] = sys.exit

    def prepare(self, program: str, arguments: list[str], environment: dict[str, str]) -> None:
        # A shell that runs the tests in the background lets them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [program, *arguments]
        module, name = PROGRAMS[program]
        self._call = getattr(import_module(module), name)

    def run(self) -> None:
        try:
            self._call()
            self._code = 0
        except SystemExit as ending:
            is_message = isinstance(ending.code, str)
            self._code = 1 if is_message else int(ending.code or 0)
            raise

    def _leave(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._code)


@cache
def _import_program(program: str) -> None:
    gc.disable()
    module, _ = PROGRAMS[program]
    for name in (module, *LATE_MODULES[program]):
        import_module(name)
    gc.freeze()
    gc.enable()


def _serve(requests: socket.socket, main: _Main) -> None:
    """Fork for each request until no more can come; returns in each fork, which should run it."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, _MAX_REQUEST_BYTES, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        _import_program(request["program"])
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:
            break
        os.waitpid(between, 0)
        requests.send(os.read(read_end, 32))
        for number in (read_end, write_end, *files):
            os.close(number)
    # The process in between ends, so that the one of the tests becomes the parent.
    between = os.getpid()
    if pid := os.fork():
        os.write(write_end, str(pid).encode())
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    requests.close()
    for target, number in enumerate(files):
        os.dup2(number, target)
    for number in (read_end, write_end, *files):
        os.close(number)
    main.prepare(**request)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    forked = _Main()
    _serve(socket.socket(fileno=int(sys.argv[1])), forked)
    forked.run()
